"""The command line from pretraining to promotion on a made-up corpus, and its errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

from engine import bundle
from engine.detector import Detector
from tests.train.pictures import corpus
from tests.train.shards import d3
from train import replay
from train.__main__ import main
from train.data import Damage, read_shard
from train.embed import load_encoder

CPU_TINY = str(Path(__file__).parents[2] / "train" / "recipes" / "cpu-tiny.toml")
RECIPE = """
seed = 3
cross_entropy_weight = 1.0
ema_decay = 0.5
[[phases]]
steps = 3
records = 4
tokens = 6
depth = 1
geometry = "native"
preset = "platform"
aligned = 0.25
"""


QUICK = ["--no-ladder", "--no-parity"]
NOTHING_TO_COMPARE = {"reference": "torch", "crops": 1, "compared": [], "not_run": []}

# The first test trains, calibrates and evaluates; beside other work that takes its time.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pretrain and probe, once; val has one source more than train, which calibration must not see."""
    root = tmp_path_factory.mktemp("cli")
    corpus(root / "data", reals=8, fakes=8, splits=("train", "val"))
    manifest = root / "data" / "manifest.tsv"
    lines = manifest.read_text().splitlines()
    for i, line in enumerate(lines):
        if line.startswith("val/") and "-source-1" in line:
            lines[i] = line.replace("-source-1", "-elsewhere")
    manifest.write_text("\n".join(lines) + "\n")
    (root / "r.toml").write_text(RECIPE)
    out, data = str(root / "run"), str(root / "data")
    assert main(["pretrain", "--recipe", str(root / "r.toml"), "--data", data, "--out", out, "--workers", "0"]) == 0
    assert main(["probe", "--out", out, "--version", "1", "--name", "made-up"]) == 0
    return root


@pytest.fixture(scope="module")
def evaluated(trained: Path) -> Path:
    """calibrate and evaluate, once."""
    out, data = str(trained / "run"), str(trained / "data")
    assert main(["calibrate", "--out", out, "--data", data, "--version", "1"]) == 0
    assert main(["evaluate", "--out", out, "--data", data, "--version", "1", "--threads", "1", *QUICK]) == 0
    return trained


def test_from_data_to_a_published_bundle(evaluated: Path) -> None:
    trained, out, models = evaluated, str(evaluated / "run"), str(evaluated / "models")
    report = json.loads((trained / "run" / "report.json").read_text())
    unseen = report["conditions"]["jpeg75"]["unseen_sources"]
    assert {s["name"] for s in unseen["slices"]} == {"real-elsewhere", "fake-elsewhere", "machine"}
    assert report["calibrated_on_sources"] == ["fake-source-0", "fake-source-1", "real-source-0", "real-source-1"]
    # Three steps teach nothing reliable: the gate is opened for this test by writing what it asks for.
    for parts in report["conditions"].values():
        parts["unseen_sources"]["heads"]["linear"]["auroc"]["low"] = 0.51
        parts["unseen_sources"]["heads"]["linear"]["at"]["fpr_0.01"]["fpr"] = 0.0
    report["parity"] = NOTHING_TO_COMPARE
    (trained / "run" / "report.json").write_text(json.dumps(report))
    assert main(["promote", "--out", out, "--version", "1", "--models", models, "--note", "A made-up run."]) == 0
    published = bundle.load(models)
    assert published.manifest.name == "made-up" and published.path.name == "1"
    assert published.manifest.metrics["report"] == report
    carried = replay.of_bundle(published)
    assert carried is not None and set(carried) == {"train", *replay.CALIBRATE, "evaluate/clean", "evaluate/jpeg75"}
    assert published.manifest.reference is not None and published.manifest.reference.images == 16
    card = (published.path / "MODEL_CARD.md").read_text()
    assert "A made-up run." in card and "fake-elsewhere" in card and "CC0" in card and str(trained) not in card
    page = (trained / "models" / "TRAINING.md").read_text()
    assert "--backend torch --head linear --crops center --no-ladder --no-parity" in page
    assert "train pretrain --data $CORPUS" in page and "3 of 3, 96 views" in page and str(trained) not in page
    with Detector.open(models, backend="torch", threads=1) as detector:
        p = detector.infer(np.zeros((1, 224, 224, 3), np.uint8))
    assert p.shape == (1, 3) and ((p >= 0) & (p <= 1)).all()


def test_a_candidate_that_fails_the_gate_is_not_published(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained, out = evaluated, str(evaluated / "run")
    path = trained / "run" / "report.json"
    report = json.loads(path.read_text())
    report["conditions"]["clean"]["unseen_sources"]["heads"]["linear"]["auroc"]["low"] = 0.4
    path.write_text(json.dumps(report))
    assert main(["promote", "--out", out, "--version", "1", "--models", str(trained / "none")]) == 1
    assert "FAIL  clean: better than chance" in capsys.readouterr().out
    assert not (trained / "none").exists()


def test_pretrain_again_resumes_at_the_end_and_exports_the_same_encoder(trained: Path) -> None:
    encoder = trained / "run" / "encoder.safetensors"
    before = encoder.read_bytes()
    arguments = ["--recipe", str(trained / "r.toml"), "--data", str(trained / "data"), "--out", str(trained / "run")]
    assert main(["pretrain", *arguments, "--workers", "0"]) == 0
    assert encoder.read_bytes() == before


def test_a_run_goes_on_from_an_earlier_encoder_and_says_so(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "more.toml").write_text(RECIPE.replace("seed = 3", "seed = 4\npool_copies = 2").replace("ema_decay = 0.5", ""))
    run = tmp_path / "run"
    given = ["--recipe", str(tmp_path / "more.toml"), "--data", str(trained / "data"), "--out", str(run), "--workers", "0"]
    assert main(["pretrain", *given, "--start", str(trained / "run" / "encoder.safetensors")]) == 0
    start, end = (load_encoder(folder / "encoder.safetensors") for folder in (trained / "run", run))
    moved = max(float(np.abs(start[name] - end[name]).max()) for name in start if name.startswith("blocks.0."))
    assert 0 < moved < 0.05  # three steps from there, not another beginning
    assert (run / "store" / "pool" / "pool.json").exists()
    facts = json.loads((run / "facts.json").read_text())
    assert facts["pretrain_command"].endswith("--start $EARLIER/encoder.safetensors")
    assert facts["earlier"] == ["python -m train pretrain --data $CORPUS --out $EARLIER --recipe train/recipes/r.toml"]
    assert main(["probe", "--out", str(run), "--version", "2", "--c", "1e-4", "--pool"]) == 0
    weak, usual = bundle.load(run / "bundles" / "2-probe"), bundle.load(trained / "run" / "bundles" / "1-probe")
    assert weak.manifest.heads.linear.c == 1e-4 and usual.manifest.heads.linear.c == 0.316
    assert np.linalg.norm(weak.heads.linear_weight) < np.linalg.norm(usual.heads.linear_weight) / 5
    assert json.loads((run / "facts.json").read_text())["probe_arguments"].endswith(" --c 0.0001 --pool")


def test_pack(trained: Path, tmp_path: Path) -> None:
    assert main(["pack", "--data", str(trained / "data"), "--split", "val", "--out", str(tmp_path), "--records", "10"]) == 0
    records = [r for shard in sorted(tmp_path.glob("*.tar")) for r in read_shard(shard, Damage())]
    assert len(records) == 16 and sum(r.real is not None for r in records) == 8


def test_no_aligned_fakes_are_made_where_none_are_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    given = [
        "pretrain",
        "--recipe",
        str(tmp_path / "r.toml"),
        "--data",
        str(corpus(tmp_path / "data")),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*given, "--no-aligned", "--workers", "0"]) == 2
    assert "r.toml: a phase has aligned fakes; leave --no-aligned out" in capsys.readouterr().err
    (tmp_path / "r.toml").write_text(RECIPE.replace("aligned = 0.25", ""))
    assert main([*given, "--no-aligned", "--workers", "0"]) == 0
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    assert facts["data"]["aligned"] == 0 and "--no-aligned" in facts["pretrain_command"]
    assert not (tmp_path / "run" / "upsampled-2").exists()


def test_from_shards_to_heads_with_a_damaged_member_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = d3(tmp_path / "in", shards=1, records=6, side=230)[0]
    data = bytearray(shard.read_bytes())
    at = data.index(b"elsa_v2__train__2.real.jpg") + 512
    data[at : at + 400] = bytes(400)
    shard.write_bytes(data)
    (tmp_path / "r.toml").write_text(RECIPE.replace("aligned = 0.25", ""))
    given = ["--recipe", str(tmp_path / "r.toml"), "--data", str(tmp_path / "in"), "--out", str(tmp_path / "run")]
    assert main(["pretrain", *given, "--workers", "1"]) == 0
    err = capsys.readouterr().err
    assert err.count("skipped elsa-0000.tar:elsa_v2__train__2.real") == 1 and "1 damaged members were skipped" in err
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    assert list(facts["skipped"]) == ["elsa-0000.tar:elsa_v2__train__2.real"]
    assert facts["data"]["real"] == 6 and facts["data"]["fake"] == 24
    # Heads are fitted on a sample of the records, which pretraining leaves behind.
    assert main(["probe", "--out", str(tmp_path / "run"), "--version", "1", "--name", "made-up"]) == 0
    assert not (tmp_path / "run" / "sample").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["probe", "--version", "1"], "--out"),
        (["probe", "--out", "{}", "--version", "1", "--copies", "0"], "0 is less than 1"),
        (["probe", "--out", "{}", "--version", "1"], "encoder.safetensors: no such file"),
        (["pack", "--data", "{}", "--out", "{}"], "manifest.tsv: no such file"),
        (["evaluate", "--data", "{}", "--out", "{}"], "needs --bundle, or --version"),
        (["evaluate", "--data", "{}", "--out", "{}", "--version", "1"], "manifest.tsv: no such file"),
        (["promote", "--out", "{}", "--version", "1", "--models", "{}"], "facts.json: no such file"),
        (["pretrain", "--recipe", "{}/r.toml", "--data", "{}", "--out", "{}"], "r.toml: no such recipe"),
        (["pretrain", "--recipe", CPU_TINY, "--data", "{}", "--out", "{}"], "neither a manifest.tsv nor .tar shards"),
        (["pretrain", "--recipe", CPU_TINY, "--data", "{}", "--out", "{}", "--workers", "-1"], "-1 is less than 0"),
    ],
)
def test_bad_arguments_exit_2_with_one_line(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([a.replace("{}", str(tmp_path)) for a in arguments])
    except SystemExit as exit_:
        code = int(str(exit_.code))
    err = capsys.readouterr().err
    assert code == 2 and says in err and err.count("\n") == 1


def test_the_command_line_needs_no_torch_to_say_what_is_wrong(tmp_path: Path) -> None:
    blocked = "import sys; sys.modules['torch'] = sys.modules['sklearn'] = None"
    script = f"{blocked}; from train.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "pack", "--data", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "manifest.tsv" in done.stderr and "Traceback" not in done.stderr
