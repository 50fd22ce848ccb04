# Sourced by run_all.sh and run_tests.sh, from the project's folder: `find_python EXTRAS MODULE...` sets $python.
#
# The active environment serves if it has silalib and the modules; else .venv is made and `.[EXTRAS]` installed there.

find_python() {
    local extras=$1 import base done stamp
    shift
    import="import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))"
    for python in python python3; do
        # -P leaves out the current folder, where silalib would be found without being installed
        if command -v "$python" >/dev/null && "$python" -P -c "$import" silalib torch "$@" 2>/dev/null; then
            return
        fi
    done
    python=.venv/bin/python
    done=.venv/installed
    stamp="$(cksum <pyproject.toml) $(cksum <constraints.txt)"
    if [ -e "$done" ] && [ "$(cat "$done")" = "$stamp" ] && "$python" -P -c "$import" silalib torch "$@"; then
        return
    fi
    for base in python3 python python3.13 python3.12 python3.11 ""; do
        if [ -z "$base" ]; then
            echo "Python 3.11 or newer is needed and was not found: install it and start again" >&2
            exit 1
        fi
        if command -v "$base" >/dev/null && "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            break
        fi
    done
    echo "Installing silalib and what it needs into .venv (once; some minutes and gigabytes) ..."
    [ -x "$python" ] || "$base" -m venv .venv
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]" || {
        echo "the installation failed: see above; once mended, start again" >&2
        exit 1
    }
    echo "$stamp" >"$done"
}
