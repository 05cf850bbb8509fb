"""A run that is killed or stopped goes on, and ends with the very bytes of an undisturbed one."""

from __future__ import annotations

import json
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import train_adapter
import training_runs as runs
from forked_script import Script, start_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lib.checkpoints import newest_checkpoint
from lib.cli import script_parser
from lib.errors import ModelmillError
from lib.options import add_settings
from lib.training import train_lora
from lib.training_run import Places
from lib.training_watch import ONE_SIGNAL

# 24 samples and 6 updates in an epoch: checkpoints lie within epochs and once (12) between two.
UPDATES, SAVE, EVALUATE = 15, 4, 3
OPTIONS = [
    *("--method lora --device cpu --threads 2 --precision fp32 --r 4 --lora-alpha 16 --lora-dropout 0.2").split(),
    *("--num-train-epochs 2.5 --per-device-train-batch-size 2 --gradient-accumulation-steps 2").split(),
    *("--learning-rate 0.02 --load-best-model-at-end").split(),
    *(f"--save-steps {SAVE} --eval-steps {EVALUATE}").split(),
]
FILES = ("adapter_model.safetensors", "adapter_config.json", "MANIFEST.json")
SCALARS = {
    "train/loss",
    "train/lr",
    "train/tokens_per_second",
    "train/micro_batch_size",
    "memory/allocated_gb",
    "memory/cached_gb",
}


def pause(*, update: int, here: Path, go: Path) -> None:
    """In the script's process: before that update say so, and wait until `go` is there."""
    from lib.adapter_trainer import AdapterTrainer

    whole = AdapterTrainer.training_step

    def training_step(self: Any, *given: Any) -> Any:
        if self.state.global_step == update - 1:
            here.touch()
            while not go.exists():
                time.sleep(0.01)
        return whole(self, *given)

    AdapterTrainer.training_step = training_step


@dataclass(frozen=True)
class Place:
    """A folder in which the same command is given again and again."""

    folder: Path
    base: Path

    def command(self, *options: str) -> list[str]:
        words = {
            "base": self.base,
            "data": self.folder / "data.jsonl",
            "eval-data": self.folder / "held.jsonl",
            "output": self.folder / "adapter",
            "checkpoints": self.folder / "work/checkpoints",
            "tensorboard": self.folder / "events",
            "history": self.folder / "history.json",
            "log": self.folder / "log.txt",
        }
        return [*(f"--{name}={value}" for name, value in words.items()), *OPTIONS, *options]

    def start(self, *, pause_at: int | None = None) -> Script:
        given: dict[str, Any] = {}
        if pause_at:
            given = {"before": pause, "update": pause_at, "here": self.folder / "here", "go": self.folder / "go"}
        said = self.folder / f"said-{len(list(self.folder.glob('said-*')))}"
        return start_script("train_adapter.py", *self.command(), output=said, **given)

    def start_until(self, update: int) -> Script:
        """Start and wait for the run to stand before that update."""
        script = self.start(pause_at=update)
        script.wait_for((self.folder / "here").exists)
        return script

    @property
    def checkpoints(self) -> list[str]:
        return [path.name for path in self.folder.glob("work/checkpoints/*/checkpoint-*")]

    @property
    def history(self) -> dict[str, Any]:
        """The run's figures without those that are measured."""
        history = json.loads((self.folder / "history.json").read_text())
        for entry in (history, *history["steps"]):
            for key in [key for key in entry if key.startswith("peak_") or "second" in key]:
                del entry[key]
        return history

    def assert_same_as(self, other: Place) -> None:
        for name in FILES:
            assert (self.folder / "adapter" / name).read_bytes() == (other.folder / "adapter" / name).read_bytes(), name
        assert self.history == other.history
        assert not (self.folder / "work/checkpoints").exists()


def place(folder: Path, base: Path) -> Place:
    folder.mkdir(exist_ok=True)
    tiny.write_data(folder / "data.jsonl", repeats=4)
    # Of bytes that are in nothing that is learned, so that it gets worse, on any processor.
    answer = {"question": "How many GPUs?", "answer": "ΩΨΞΔ" * 12}
    (folder / "held.jsonl").write_text(f"{json.dumps(answer)}\n" * 3)
    return Place(folder, base)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Place:
    """A run that nothing happened to."""
    done = place(tmp_path_factory.mktemp("undisturbed"), tiny_base)
    script = done.start()
    assert script.wait() == 0, script.text
    steps = [entry["step"] for entry in done.history["evaluations"]]
    assert (len(done.history["steps"]), steps) == (UPDATES, [3, 6, 9, 12, 15])
    # So that the best weights have to survive a restart, too.
    assert done.history["kept"] == "best" and done.history["kept_step"] in (3, 6)
    return done


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Place:
    """A run that was killed within update 11; not to be changed."""
    done = place(tmp_path_factory.mktemp("killed"), tiny_base)
    script = done.start_until(11)
    script.send(signal.SIGKILL)
    assert script.wait() == -signal.SIGKILL
    assert done.checkpoints == ["checkpoint-8"]
    assert not (done.folder / "adapter").exists()
    (done.folder / "here").unlink()
    return done


@pytest.fixture
def copied(killed: Place, tmp_path: Path) -> Place:
    return Place(Path(shutil.copytree(killed.folder, tmp_path / "copy")), killed.base)


def scalars(folder: Path) -> dict[str, list[int]]:
    """The steps of each scalar, as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == {tag for tag, kind in events.Tags().items() for tag in (kind or [])}
    return {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_killed_run_goes_on(copied: Place, undisturbed: Place) -> None:
    script = copied.start()
    assert script.wait() == 0, script.text
    assert "going on from the checkpoint at step 8" in script.text
    copied.assert_same_as(undisturbed)


def test_tensorboard_shows_every_step_once(copied: Place, undisturbed: Place) -> None:
    expected = dict.fromkeys(SCALARS, list(range(1, UPDATES + 1))) | {"eval/loss": [3, 6, 9, 12, 15]}
    assert scalars(undisturbed.folder / "events") == expected
    script = copied.start()
    assert script.wait() == 0, script.text
    assert len(list((copied.folder / "events").iterdir())) == 2
    assert scalars(copied.folder / "events") == expected
    # What a run that is over has left there gives way to the next one.
    script = copied.start()
    assert script.wait() == 0, script.text
    assert scalars(copied.folder / "events") == expected


def test_a_checkpoint_that_was_cut_short_is_passed_over(copied: Place, undisturbed: Place) -> None:
    (weights,) = copied.folder.glob("work/checkpoints/*/checkpoint-8/trained.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    script = copied.start()
    assert script.wait() == 0, script.text
    assert "a checkpoint at step 8 was cut short and is removed" in script.text
    assert "going on" not in script.text
    copied.assert_same_as(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stopped_run_goes_on_from_that_very_step(
    number: signal.Signals, tiny_base: Path, tmp_path: Path, undisturbed: Place
) -> None:
    stopped = place(tmp_path / "stopped", tiny_base)
    script = stopped.start_until(7)
    script.send(number)
    script.wait_for(lambda: "stopping after this update, with a checkpoint; once more stops at once" in script.text)
    (stopped.folder / "go").touch()
    assert script.wait() == 130
    said = script.text.splitlines()
    assert "stopped after step 7; the same command goes on from there" in said
    assert said[-1] == "train_adapter.py: interrupted; nothing unfinished has a final name"
    assert "Traceback" not in script.text
    assert stopped.checkpoints == ["checkpoint-7"]
    assert not (stopped.folder / "adapter").exists()
    script = stopped.start()
    assert script.wait() == 0, script.text
    assert "going on from the checkpoint at step 7" in script.text
    stopped.assert_same_as(undisturbed)


def test_a_second_signal_stops_at_once(tiny_base: Path, tmp_path: Path) -> None:
    stopped = place(tmp_path / "stopped", tiny_base)
    script = stopped.start_until(6)
    for _ in range(2):
        script.send(signal.SIGTERM)
        script.wait_for(lambda: "once more stops at once" in script.text)
        time.sleep(ONE_SIGNAL)
    assert script.wait() == 130
    assert "Traceback" not in script.text
    assert stopped.checkpoints == ["checkpoint-4"], "that of the last regular one"
    assert not (stopped.folder / "adapter").exists()


def test_signals_that_come_together_are_one(tiny_base: Path, tmp_path: Path) -> None:
    """As those of Slurm at a time limit do."""
    stopped = place(tmp_path / "stopped", tiny_base)
    script = stopped.start_until(6)
    script.send(signal.SIGTERM)
    script.wait_for(lambda: "once more stops at once" in script.text)
    script.send(signal.SIGTERM)
    (stopped.folder / "go").touch()
    assert script.wait() == 130
    assert stopped.checkpoints == ["checkpoint-6"]


def test_a_signal_in_the_last_update_loses_nothing(tiny_base: Path, tmp_path: Path, undisturbed: Place) -> None:
    late = place(tmp_path / "late", tiny_base)
    script = late.start_until(UPDATES)
    script.send(signal.SIGTERM)
    script.wait_for(lambda: "stopping after this update" in script.text)
    (late.folder / "go").touch()
    assert script.wait() == 0, script.text
    late.assert_same_as(undisturbed)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], "checkpoint-8"),
        (["--learning-rate", "0.01"], None),
        (["--seed", "1"], None),
        (["--lora-dropout", "0.1"], None),
        (["--num-train-epochs", "3"], None),
        (["--data", "other.jsonl"], None),
    ],
)
def test_only_the_same_run_goes_on(
    options: list[str], found: str | None, copied: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(ModelmillError):
        pass

    def looking(*, places: Places, **_: Any) -> None:
        newest = newest_checkpoint(places.run)
        raise Enough(newest.name if newest else None)

    monkeypatch.chdir(copied.folder)
    monkeypatch.setattr(train_adapter, "fix_threads", lambda threads: None)
    monkeypatch.setattr(train_adapter, "train_lora", looking)
    tiny.write_data(Path("other.jsonl"), repeats=3)
    parser = script_parser("", threads=False)
    for name in ("base", "base-manifest", "output", "checkpoints", "tensorboard", "history"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--gpus", default="")
    parser.add_argument("--method-reason")
    add_settings(parser, "train")
    with pytest.raises(Enough) as told:
        train_adapter._work(parser.parse_args(copied.command(*options)))
    assert told.value.args == (found,)


@pytest.mark.parametrize("asked", [{"max_steps": 4}, {"num_train_epochs": 2}], ids=["by steps", "by epochs"])
def test_a_run_that_ended_with_a_checkpoint_adds_no_update(
    asked: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    """As one does that is killed after its last update, before the adapter is written."""
    data = str(tiny.write_data(tmp_path / "data.jsonl"))
    run = runs.settings(data=data, save_steps=2, lora={"r": 4, "lora_dropout": 0.2}, **asked)
    places = Places(base=tiny_base, run=tmp_path / "run", tensorboard=None)
    first, again = (train_lora(places=places, settings=run, gpus=[]) for _ in range(2))
    last = first.history["kept_step"]
    assert newest_checkpoint(places.run).name == f"checkpoint-{last}"
    assert again.history["kept_step"] == last
    assert [entry["step"] for entry in again.history["steps"]] == list(range(1, last + 1))
    ours, theirs = (
        {name: weight for name, weight in each.model.named_parameters() if weight.requires_grad}
        for each in (again, first)
    )
    assert ours and all(weight.equal(theirs[name]) for name, weight in ours.items())
