"""Run folders in the loop's layout, of tiny systems that plain torch trained for two epochs: no Ray, no DeepSpeed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from mmsa_dist import checkpoint, run_folder
from mmsa_dist.data_card import DataCard
from mmsa_dist.metrics import evaluate, kind_for
from mmsa_dist.recipe import Recipe, from_dict
from mmsa_dist.systems import DataSpec, get_system
from shards.batch import BatchSpec
from shards.index import Index
from shards.loader import Loader
from shards.plan import evaluation_plan, training_plan
from shards.read import ShardReader
from shards.utterance import MODALITIES
from shards.write import pack
from tests.data import TinySource


def packed(folder: Path, samples: int = 50, absent: float = 0.1, seed: int = 0) -> Index:
    """A small data set, in which some samples lack audio or vision."""
    return pack(TinySource(samples, absent, seed), folder, dtype="float32")[0]


def trained(
    runs: Path,
    index: Index,
    name: str = "run",
    system: str = "self_mm",
    *,
    encoder: str | None = None,
    epochs: int = 2,
    seed: int = 1,
    **values: Any,
) -> tuple[Path, Recipe]:
    """Trains and leaves ``runs/<name>`` as the loop would.

    Args:
        values: more of the recipe, by its top-level keys.
    """
    recipe = from_dict(
        {
            "system": system,
            "seed": seed,
            "text": {"encoder": encoder, "pretrained": False, "max_tokens": 24},
            "train": {"epochs": epochs, "monitor": "mae"},
            **values,
            "data": {"path": str(index.folder), "batch_size": 16, **values.get("data", {})},
        }
    )
    run = runs / name
    for part in ("events", "predictions", "best"):
        (run / part).mkdir(parents=True)
    run_folder.write_text(run / "recipe.yaml", yaml.safe_dump(recipe.dump(), sort_keys=False))
    run_folder.write_json(run / "environment.json", run_folder.environment())
    run_folder.write_json(run / "plan.json", {"epochs": epochs})
    spec = _spec(recipe, index)
    card = DataCard.of(index, spec, kind_for(index.label_range), recipe.data.normalize)
    card.save(run)
    _train(run, recipe, index, spec)
    return run, recipe


def _spec(recipe: Recipe, index: Index) -> DataSpec:
    widths = {m: index.modalities[m].width for m in recipe.data.modalities or MODALITIES if m in index.modalities}
    if recipe.text.encoder is not None:
        from mmsa_dist.layers.text import encoder_width

        widths = {"text": encoder_width(recipe.text), **{m: w for m, w in widths.items() if m != "text"}}
    return DataSpec(widths, index.label_range, index.tasks, recipe.text if recipe.text.encoder else None)


def _train(run: Path, recipe: Recipe, index: Index, spec: DataSpec) -> None:
    torch.manual_seed(recipe.seed)
    system = get_system(recipe.system)(recipe.model, spec)
    optimizer = torch.optim.AdamW(system.parameters(), lr=1e-3)
    ids = None
    if spec.text is not None:
        from mmsa_dist.layers.text import text_ids

        ids = text_ids(spec.text, index)
    batches = BatchSpec.of(index, tuple(spec.widths), ids, recipe.data.normalize)
    reader = ShardReader(index)
    events = run_folder.Events(run, 0)
    with Loader(reader, batches, readers=0) as loader:
        steps, valid = 0, {}
        for epoch in range(1, recipe.train.epochs + 1):
            plan = training_plan(index, "train", recipe.seed, epoch, recipe.data.batch_size)
            system.train()
            losses = []
            for (batch,) in loader.train(plan, 0, 1):
                tasks = system(batch).tasks
                targets = {task: batch.labels.get(task, batch.labels["M"]) for task in tasks} | {"M": batch.labels["M"]}
                loss = system.loss(system(batch), batch, targets).total
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                steps += 1
            valid = _evaluate(run, system, loader, index, "valid")
            events.write(
                "epoch",
                epoch=epoch,
                step=steps,
                train_loss=float(np.mean(losses)),
                parts={"M": float(np.mean(losses))},
                lr={"rest": 1e-3},
                valid=valid,
                seconds=0.1,
            )
        test = _evaluate(run, system, loader, index, "test")
    events.close()
    save_file(system.state_dict(), run / "best" / "weights.safetensors")
    checkpoint.write_manifest(run / "best")
    result = {
        "system": recipe.system,
        "data": index.name,
        "synthetic": index.synthetic,
        "fingerprint": index.fingerprint,
        "selected_on": f"validation {recipe.train.monitor}",
        "best_epoch": recipe.train.epochs,
        "epochs": recipe.train.epochs,
        "steps": steps,
        "valid": valid,
        "test": test,
    }
    run_folder.write_json(run / "result.json", result)


@torch.no_grad()
def _evaluate(run: Path, system: torch.nn.Module, loader: Loader, index: Index, split: str) -> dict[str, float | None]:
    system.eval()
    numbers, keys, y, p = [], [], [], []
    for batch in loader.evaluate(evaluation_plan(index, split, 16), 0, 1):
        real = batch.weight > 0
        numbers.append(batch.numbers[real])
        keys += [key for key, kept in zip(batch.keys, real, strict=True) if kept]
        y.append(batch.labels["M"][real])
        p.append(system(batch).tasks["M"][real])
    truth, predicted = torch.cat(y).numpy(), torch.cat(p).numpy()
    np.savez(run / "predictions" / f"{split}.npz", numbers=torch.cat(numbers), key=np.array(keys), y=truth, p=predicted)
    return evaluate(kind_for(index.label_range), truth, predicted)


def tiny_encoder(folder: Path) -> Path:
    """A BERT with 16 hidden units and a word-piece tokenizer, as a Hugging Face folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "really", "not"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    shape = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,  # its weights stay random: they must make a difference between texts
    )
    torch.manual_seed(0)
    BertModel(shape).save_pretrained(folder)
    return folder
