"""README is what the committed records say."""

import re
import shutil
import subprocess
from importlib.metadata import version

import pandas as pd
import pytest
import torch
from test_claims import GAINS, made_up

from silalib import records
from silalib.analysis import claims
from silalib.analysis.evidence import evidence
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
            shutil.copytree(ROOT / path.parent, results / path.parent.relative_to("results"))
    return results


def test_what_is_generated_is_what_the_records_say(committed):
    """README's answer, results/README.md, results/answer.json and the picture; that byte by byte under the versions of
    constraints.txt."""
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    alike = all(version(name) == tested[name] for name in ("matplotlib", "numpy"))
    for name, content in readme.render(readme.collect()).items():
        if alike or not name.endswith(".svg"):
            assert content == (ROOT / name).read_bytes(), f"{name} is old: python -m silalib.report.readme"


def test_every_link_of_the_results_leads_to_a_committed_file():
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]*)\)", text)]
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True).stdout.splitlines()
    assert len(links) > 10
    for link in links:
        path = (ROOT / "results" / link).resolve()
        assert path.exists(), link
        name = path.relative_to(ROOT).as_posix()
        assert not listed or name in listed or any(file.startswith(f"{name}/") for file in listed), link


def test_the_first_screen_of_the_readme_has_the_answer():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.sub("```.*?```", "", text, flags=re.DOTALL).split()) <= 900  # without code and what it prints
    assert text.index("**Does SiLa work?**") < text.index("**Should I use it?**") < 1000
    assert "| Better than training alone? |" in text[:1500]


def test_profiles_are_never_mixed():
    """Table 1's records of one seed at one profile, Figure 6's of three at another."""
    grids = {name: EXHIBITS[name].grid("paper") for name in EXHIBITS}
    found = {"paper": made_up("6", GAINS["reproduced"]), "small": made_up("1", GAINS["reproduced"][:1])}
    found = {profile: evidence(grids, made.records, profile) for profile, made in found.items()}
    for made in found.values():
        for run, record in made.records.items():
            record.result = {"provenance": provenance(run)}
            record.heads = [{"top1": 50.0, "test_concentration": 7, "ece": 5.0} | head for head in record.heads]
            record.history = pd.DataFrame([(h, 50.0, 1.0) for h in (0, 1)], columns=["head", "test_top1", "train_nll"])
            record.noise = pd.DataFrame([(h, "absolute", s, 1.0) for h in (0, 1) for s in (0, 1)], columns=NOISE)
    text = readme.render(found)["results/README.md"].decode()
    paper, small = re.search("### Profile paper(.*)### Profile small(.*)## What was trained", text, re.DOTALL).groups()
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


NOISE = ["head", "kind", "sigma", "nll"]


def provenance(run):
    part = {"device": "a CPU", "precision": "float32"}
    if run.method == "dml":
        part = {"parts": [part, {"device": "a GPU", "precision": "bfloat16"}]}
    return {"seconds": 10, "train_images": 50000, **part}


def test_a_damaged_record_stops_it(committed, capsys):
    run = next(run for run in claims.collect("paper").records if run.dataset == "mnist")
    folder = committed / "paper" / "runs" / run.key
    (folder / "history.csv").write_text("epoch\n")
    before = (ROOT / "README.md").read_bytes()
    with pytest.raises(SystemExit, match=f"{re.escape(run.key)} has no whole record"):
        readme.main()
    assert (ROOT / "README.md").read_bytes() == before
    assert "history.csv" in capsys.readouterr().err


def test_only_what_is_between_the_marks_is_written(tmp_path):
    own = tmp_path / "README.md"
    own.write_text("# Title\n<!-- measured -->\nbefore\n<!-- end -->\nThe rest\n")
    made = readme.render({}, tmp_path)["README.md"].decode()
    assert made.startswith("# Title\n<!-- measured -->\n\n**Does SiLa work?** Not known yet.\n")
    assert made.endswith("<!-- end -->\nThe rest\n") and "before" not in made
    own.write_text("no marks")
    with pytest.raises(UserError, match="no place between <!-- measured --> and <!-- end -->"):
        readme.render({}, tmp_path)


@pytest.fixture
def weights(committed):
    """Method -> Net1 from its weights in git, and the record."""
    runs = {run.method: run for run in EXHIBITS["table1"].grid("small", [0]) if run.method in ("ind", "sila")}
    return {method: (records.load_network(run), records.load(run)) for method, run in runs.items()}


def test_weights_in_git(weights):
    for network, _ in weights.values():
        assert network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 100)


def test_the_weights_in_git_predict_what_the_record_says(weights, real_data):
    """Half precision changes nearly no prediction."""
    images = torch.as_tensor(real_data("cifar100").test_images[:500])
    for network, record in weights.values():
        with torch.no_grad():
            found = network(images).argmax(1).numpy()
        assert (found == record.test["predicted_0"][:500]).mean() > 0.98
