"""README is what the committed records say."""

import io
import re
import shutil
import subprocess
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
from test_claims import GAINS, made_up

from silalib.analysis import claims
from silalib.errors import UserError
from silalib.experiments import EXHIBITS
from silalib.files import ROOT
from silalib.report import readme


@pytest.fixture
def committed(results):
    """The records that are in git, or all of them where there is no git, as this test's own results."""
    found = [path.relative_to(ROOT) for path in ROOT.glob("results/*/runs/*/result.json")]
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "results"], capture_output=True, text=True)
    if listed.returncode == 0:
        found = [path for path in found if str(path) in listed.stdout.splitlines()]
    for path in found:
        if "quick" not in path.parts:
            link = results / path.parent.relative_to("results")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(ROOT / path.parent)
    return results


def pixels(content):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def test_readme_is_what_the_records_say(committed, tmp_path):
    """Its picture too: every pixel under the versions of constraints.txt, else nearly."""
    own, picture = tmp_path / "README.md", tmp_path / "measured.png"
    text = (ROOT / "README.md").read_text()
    own.write_text(readme.MARKED.sub("", text))
    assert own.read_text() != text
    readme.write(*readme.render(readme.collect()), own, picture)
    again = "README.md is not what the records say: python -m silalib.report.readme"
    assert own.read_text() == text, again
    kept = (ROOT / "docs" / "images" / "measured.png").read_bytes()
    assert len(kept) < 200_000
    before, now = pixels(kept), pixels(picture.read_bytes())
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    if all(version(name) == tested[name] for name in ("matplotlib", "numpy", "pillow")):
        assert np.array_equal(before, now), again
    assert before.shape == now.shape and abs(before - now).mean() < 5, again


def test_profiles_are_never_mixed():
    """Table 1's records of one seed at one profile, Figure 6's of three at another."""
    grids = {name: EXHIBITS[name].grid("paper") for name in ("table1", "table2", "table3", "fig6")}
    found = {"paper": made_up("6", GAINS["reproduced"]), "small": made_up("1", GAINS["reproduced"][:1])}
    found = {profile: claims.evidence(grids, evidence.records, profile) for profile, evidence in found.items()}
    for evidence in found.values():
        for run, record in evidence.records.items():
            record.result = {"provenance": provenance(run)}
            record.features = features(len(run.nets))
            record.heads = [{"top1": 50.0, "test_concentration": 7} | head for head in record.heads]
    text, picture = readme.render(found)
    paper, small = text.split("- Profile ")[1:]
    rows = lambda part: [re.split(r" *\| *", line)[1:-1] for line in part.splitlines() if line.startswith("|")]
    (scatter,) = [row for row in rows(paper) if row[1].startswith("scatter ratio")]
    assert scatter[2:] == ["-", "+0.250 ± 0.025 log ratio, 3 seeds", "reproduced"]
    top1, nll = [row for row in rows(small) if row[0].startswith("1. ")]
    assert top1[1:4] == ["top-1, SiLa over IND (Table 1, 10 networks)", "+1.58", "+2.40 points, 1 seed"]
    assert top1[4] == nll[4] == "so far, 1 of 3 seeds"
    assert not [row for row in rows(paper) if row[0].startswith("1. ")]
    # 6 runs of 10 s; 18 trainings of 10 s, one by two devices
    assert "Figure 6: features on MNIST | paper | 20 of 20 epochs, all images | 6 of 6 | 0, 1, 2 | 1 min 00 s" in text
    assert "Table 1: CIFAR-100 | small | 260 of 260 epochs, all images | 18 of 54 | 0 | 3 min 00 s" in text
    assert "a CPU, float32; a GPU, bfloat16 |\n" in text
    assert "18 of 153 runs are trained, in 3 min 00 s, for Table 1." in text
    assert "Trained alone, MobileNet reaches 50.00% top-1 on CIFAR-100, in the paper 66.90%." in text
    assert len(np.unique(pixels(picture).reshape(-1, 3), axis=0)) > 20


def test_what_the_paper_prints_for_the_networks_that_are_trained():
    """ResNet18+ResNet18: alone 76.45; with SiLa 77.85; with SiLa+DML 78.13 and 78.03."""
    grids = {name: EXHIBITS[name].grid("small") for name in claims.TABLES}
    records = {run: SimpleNamespace(run=run, heads=[{"top1": 50.0}] * len(run.nets)) for run in grids["table1"]}
    alone, same = readme.beside_the_paper(claims.Evidence(grids=grids, records=records))
    assert alone == "Trained alone, ResNet18 reaches 50.00 ± 0.00% top-1 on CIFAR-100, in the paper 76.45%."
    assert same.startswith("Of Table 1 it has ResNet18+ResNet18 alone, where the paper prints +1.40 (SiLa), ")
    assert same.endswith(", +1.63 (SiLa+DML).")
    every = {name: EXHIBITS[name].grid("paper") for name in claims.TABLES}
    records = {run: SimpleNamespace(run=run, heads=[{"top1": 50.0}] * len(run.nets)) for run in every["table1"]}
    (alone,) = readme.beside_the_paper(claims.Evidence(grids=every, records=records))
    assert alone.startswith("Trained alone, MobileNet reaches 50.00 ± 0.00%")


def provenance(run):
    part = {"device": "a CPU", "precision": "float32"}
    if run.method == "dml":
        part = {"parts": [part, {"device": "a GPU", "precision": "bfloat16"}]}
    return {"seconds": 10, "train_images": 50000, **part}


def features(networks):
    points = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float16)
    return {f"test_{head}": points for head in range(networks)} | {"test_labels": np.arange(50) % 10}


def test_a_damaged_record_stops_it(committed, capsys):
    run = next(run for run in claims.collect("paper").records if run.dataset == "mnist")
    folder = committed / "paper" / "runs" / run.key
    whole = folder.resolve()
    folder.unlink()
    shutil.copytree(whole, folder)
    (folder / "history.csv").write_text("epoch\n")
    before = (ROOT / "README.md").read_bytes()
    with pytest.raises(SystemExit, match=f"{re.escape(run.key)} has no whole record"):
        readme.main()
    assert (ROOT / "README.md").read_bytes() == before
    assert "history.csv" in capsys.readouterr().err


def test_only_what_is_between_the_marks_is_written(tmp_path):
    own, picture = tmp_path / "README.md", tmp_path / "measured.png"
    own.write_text("# Title\n<!-- measured -->\nold\n<!-- end -->\nThe rest\n")
    readme.write(r"new \1" + "\n", b"picture", own, picture)
    assert own.read_text() == "# Title\n<!-- measured -->\n" + r"new \1" + "\n<!-- end -->\nThe rest\n"
    assert picture.read_bytes() == b"picture"
    own.write_text("no marks")
    with pytest.raises(UserError, match="no place between <!-- measured --> and <!-- end -->"):
        readme.write("text", b"other", own, picture)
    assert picture.read_bytes() == b"picture"
