# Sourced by run_all.sh and run_tests.sh, from the project's folder: `find_python EXTRAS MODULE...` sets $python.
#
# The active environment serves if it has silalib and the modules; else .venv is made and `.[EXTRAS]` installed there.
# A relative SILALIB_RESULTS or SILALIB_DATA is meant from the folder in which the script was started.

for name in SILALIB_RESULTS SILALIB_DATA; do
    case ${!name:-/} in
    /*) ;;
    *) export "$name=$OLDPWD/${!name}" ;;
    esac
done

find_python() {
    local extras=$1 import base
    shift
    import="import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))"
    for python in python python3; do
        # -P leaves out the current folder, where silalib would be found without being installed
        if command -v "$python" >/dev/null && "$python" -P -c "$import" silalib torch "$@" 2>/dev/null; then
            return
        fi
    done
    for base in python3 python python3.13 python3.12 python3.11 ""; do
        if [ -z "$base" ]; then
            echo "Python 3.11 or newer is needed and was not found: install it and start again" >&2
            exit 1
        fi
        if command -v "$base" >/dev/null && "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            break
        fi
    done
    python=.venv/bin/python
    # the lock is held by this script and all that it starts, so that nothing is installed twice at once
    exec 9<pyproject.toml
    "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || {
        echo "Waiting for another installation into .venv to end ..." >&2
        "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' || : # a file system without locks
    }
    installed "$import" silalib torch "$@" || install "$extras" "$base"
    exec 9<&-
}

stamp() {
    echo "$(cksum <pyproject.toml) $(cksum <constraints.txt)"
}

installed() {
    [ ! -e .venv.unfinished ] && [ "$(cat .venv/installed 2>/dev/null)" = "$(stamp)" ] && "$python" -P -c "$@"
}

install() {
    echo "Installing silalib and what it needs into .venv (once; some minutes and gigabytes) ..."
    # an installation that was interrupted is not mended: it begins again
    if [ -e .venv.unfinished ] || ! "$python" -m pip --version >/dev/null 2>&1; then
        : >.venv.unfinished
        rm -rf .venv
        "$2" -m venv .venv
    fi
    : >.venv.unfinished
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]" || {
        echo "the installation failed: see above; once mended, start again" >&2
        exit 1
    }
    stamp >.venv/installed
    rm .venv.unfinished
}
