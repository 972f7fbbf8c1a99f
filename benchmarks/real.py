"""Trains on real CMU-MOSI and writes the results table: ``make real DATA=FOLDER``.

FOLDER holds ``utterances.csv`` and ``features.npz`` (docs/your-data.md). Two splits are packed: the official one with
text and audio (its vision features leak the test labels, so vision is absent), and Poria's with text, audio and
vision, ten training videos held out as validation; with ``--splits poria-blind`` Poria's without vision, too. Every
system is trained with every seed through the whole path (Ray, two workers, ZeRO-1), selected on validation; the test
split is read once a run. Of the labels that a generator made it is kept how far they are from the multimodal ones.
What is finished already is not run again, and what was recorded of other systems stays.
"""

import argparse
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import MINILM, record
from mmsa_dist import labels, labels_shown, run_folder
from mmsa_dist.recipe import differences, load_recipe, read_recipe
from mmsa_dist.session import open_index, settled

SPLITS: dict[str, tuple[str, list[str]]] = {
    "official": (
        "MOSI, official split: text (fine-tuned) + audio",
        ["--split", "split_official", "--audio", "audio_opensmile", "--name", "mosi-official"],
    ),
    "poria": (
        "MOSI, Poria split: text (fine-tuned) + audio + vision",
        [
            *("--split", "split_poria", "--hold-out-valid", "10", "--name", "mosi-poria"),
            *("--audio", "audio_opensmile", "--vision", "vision_cnn3d"),
        ],
    ),
    "poria-blind": (
        "MOSI, Poria split without vision: text (fine-tuned) + audio",
        [
            *("--split", "split_poria", "--hold-out-valid", "10", "--name", "mosi-poria-blind"),
            *("--audio", "audio_opensmile"),
        ],
    ),
}
ASKED = ("official", "poria")
"""The splits of every run; the third shows what vision does to the second."""
SYSTEMS = ("tam_ulag", "iam", "pmr", "ufen_mtfn", "self_mm", "sugrm", "mult")
RECIPES = Path("benchmarks/recipes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with utterances.csv and features.npz")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--splits", nargs="+", default=list(ASKED), choices=list(SPLITS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("real"), help="where shards and runs go")
    parser.add_argument("--encoder", default=MINILM, help="text encoder (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("overrides", nargs="*", help="after --: recipe values for every run, e.g. -- --epochs 1")
    options = parser.parse_args()
    for split in options.splits:
        shards = pack(options.data, options.out / split, SPLITS[split][1])
        for system in options.systems:
            found = results(system, shards, options.seeds, options.encoder, options.out / "runs", options.overrides)
            if not options.no_record:
                print(f"written to {keep(split, found)}, and into README.md")


def keep(split: str, found: dict[str, Any]) -> Path:
    """Writes one system's results on a split, among those that are recorded already."""
    environment = record.environment()
    found |= {name: environment[name] for name in ("commit", "changed_since_commit", "date")}
    file = record.RESULTS / "real.json"
    splits = run_folder.read_json(file)["splits"] if file.is_file() else []
    runs = {
        name: {run["system"]: run for part in splits if part["name"] == name for run in part["runs"]} for name in SPLITS
    }
    runs[split][found["system"]] = found
    content = [
        {"name": name, "title": title, "runs": [runs[name][system] for system in SYSTEMS if system in runs[name]]}
        for name, (title, _) in SPLITS.items()
        if runs[name]
    ]
    return record.write("real", {"name": "real", "command": record.command_line(), **environment, "splits": content})


def pack(data: Path, out: Path, options: list[str]) -> Path:
    if not (out / "index.json").is_file():
        run(["pack", "table", str(data / "utterances.csv"), str(data / "features.npz"), "--out", str(out), *options])
    return out


def results(
    system: str, shards: Path, seeds: list[int], encoder: str, runs: Path, overrides: list[str]
) -> dict[str, Any]:
    """Test and validation metrics of one system over the seeds."""
    recipe = RECIPES / f"{system}.yaml"
    words = ["--data", str(shards), "--workers", "2", "--text.encoder", encoder, "--register", "none", *overrides]
    found, made = [], []
    for seed in seeds:
        chosen = [*words, "--seed", str(seed)]
        folder = finished(system, recipe, chosen, runs)
        if folder is None:
            name = f"{system}-{shards.name}-{seed}"
            run(["train", system, "--recipe", str(recipe), "--runs-dir", str(runs), "--name", name, *chosen])
            folder = finished(system, recipe, chosen, runs)
        assert folder is not None, "a run that ended well has a result"
        found.append(run_folder.read_json(folder / "result.json"))
        made.append(generated(folder))
    command = (
        f"mmsa-dist train {system} --recipe {recipe} --data {record.portable(str(shards))} --workers 2 "
        f"--text.encoder {encoder} --seed S"
    )
    return {
        "system": system,
        "command": " ".join([command, *map(shlex.quote, overrides)]),
        "seeds": seeds,
        "test": [result["test"] for result in found],
        "valid": [result["valid"] for result in found],
        "best_epoch": [result["best_epoch"] for result in found],
        "fingerprint": found[0]["fingerprint"],
        **({"generated": made} if any(made) else {}),
    }


def generated(folder: Path) -> list[dict[str, Any]]:
    """`labels_shown.Change` of each modality after the last epoch of a run; empty where it generates no labels."""
    saved = labels.recipe_of(folder)
    if saved.label_generator in ("none", "multimodal"):
        return []
    made = labels.beside_truth(labels.generated(folder, saved), saved)
    return [asdict(change) for change in labels_shown.changes(made)]


def finished(system: str, recipe: Path, words: list[str], runs: Path) -> Path | None:
    """The newest finished run of exactly this recipe."""
    wanted = load_recipe(system, str(recipe), words)
    wanted = settled(wanted, open_index(wanted))
    for result in sorted(runs.glob("*/result.json"), reverse=True):
        saved = read_recipe(result.parent / "recipe.yaml") if result.is_file() else None
        if saved is not None and saved.system == system and not different(saved, wanted, result):
            return result.parent
    return None


def different(saved: Any, wanted: Any, result: Path) -> bool:
    from shards.index import Index

    fingerprint = Index.load(wanted.data.path).fingerprint
    return bool(differences(saved, wanted)) or run_folder.read_json(result)["fingerprint"] != fingerprint


def run(words: list[str]) -> None:
    """One `mmsa-dist` command, shown as it is typed."""
    print(f"\n$ mmsa-dist {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "mmsa_dist", *words], check=True)


if __name__ == "__main__":
    main()
