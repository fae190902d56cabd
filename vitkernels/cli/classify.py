"""``vitkernels classify``: photos through the fused model, checked against timm's own, with a picture of where it looks."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _checkpoint, _models, _photos
from ._output import console, picture_path, save_picture

_TOP = 5


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register the command."""
    parser = subparsers.add_parser("classify", help="classify photos with a fused model", allow_abbrev=False)
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image files")
    name = f"timm name or size ({', '.join(_models.SIZES)}) (default: vit_base_patch16_224)"
    parser.add_argument("--model", default="vit_base_patch16_224", help=name)
    weights = "weights as .safetensors, .pth or .pt (default: timm's pretrained weights)"
    parser.add_argument("--checkpoint", metavar="FILE", help=weights)
    attention = "draw attention rollout (Abnar and Zuidema 2020) and the last layer's attention over each photo"
    parser.add_argument("--attention-map", metavar="OUT.png", help=attention)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Classify every photo in float32, fused and unfused."""
    from timm.data import create_transform, resolve_data_config

    device = _models.pick_device(args.device)
    picture = picture_path(args.attention_map, "--attention-map") if args.attention_map else None
    photos = [_photos.open_photo(photo) for photo in args.photos]
    name = _models.check_name(args.model)
    model = _checkpoint.model_from_file(name, args.checkpoint) if args.checkpoint else _checkpoint.pretrained_model(name)
    model = model.to(device)
    config = resolve_data_config({}, model=model)
    transform = create_transform(**config, is_training=False)
    images = torch.stack([transform(photo) for photo in photos]).to(device)
    with torch.inference_mode():
        unfused, maps = _unfused(model, images, picture is not None)
        logits = _models.fuse(model, name)(images)
    names = _class_names(logits.shape[-1])
    found = [
        {"photo": photo, "top": _top(row, names), "max_abs_diff": (row - other).abs().max().item()}
        for photo, row, other in zip(args.photos, logits, unfused, strict=True)
    ]
    if picture:
        _draw(picture, found, images, maps, config)
    return {
        "model": name,
        "weights": args.checkpoint or "pretrained",
        "device": str(device),
        "classes": logits.shape[-1],
        "photos": found,
        "attention_map": args.attention_map,
    }


def _unfused(model: nn.Module, images: Tensor, record: bool) -> tuple[Tensor, dict[str, Any]]:
    """timm's logits and, when asked for, its heat maps (B, Gh, Gw)."""
    if not record:
        return model(images), {}
    from . import _attention

    with _attention.recorded(model) as layers:
        logits = model(images)
    class_token = bool(getattr(model, "has_class_token", False))
    prefix, (height, width) = model.num_prefix_tokens, model.patch_embed.patch_size
    grid = (images.shape[-2] // height, images.shape[-1] // width)
    maps = {
        kind: _attention.heat_map(attention, prefix, grid, class_token).cpu().numpy()
        for kind, attention in (("rollout", _attention.rollout(layers)), ("last", layers[-1]))
    }
    return logits, {**maps, "query": "of the class token" if class_token else "mean of all patches (no class token)"}


def _class_names(classes: int) -> list[str]:
    if classes != 1000:
        return [f"class {index}" for index in range(classes)]
    from timm.data import ImageNetInfo

    return ImageNetInfo().label_descriptions()


def _top(logits: Tensor, names: list[str]) -> list[dict[str, Any]]:
    probabilities, indices = logits.float().softmax(-1).topk(min(_TOP, len(names)))
    pairs = zip(indices.tolist(), probabilities.tolist(), strict=True)
    return [{"class": index, "name": names[index], "probability": probability} for index, probability in pairs]


def _draw(path: Path, found: list[dict[str, Any]], images: Tensor, maps: dict[str, Any], config: dict[str, Any]) -> None:
    from ._plot import attention_figure

    mean, std = (images.new_tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    shown = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3), the crop that the model saw
    rows = []
    for index, photo in enumerate(found):
        best = photo["top"][0]
        caption = f"{best['name'].partition(',')[0]}, {best['probability']:.1%}"
        heat = {kind: maps[kind][index] for kind in ("rollout", "last")}
        labels = {"name": Path(photo["photo"]).name, "caption": caption, "query": maps["query"]}
        rows.append({**labels, **heat, "photo": shown[index]})
    save_picture(attention_figure(rows), path)


def show(document: dict[str, Any]) -> None:
    """Print the best classes of each photo."""
    from rich.table import Table

    out = console()
    for photo in document["photos"]:
        table = Table()
        table.add_column("probability", justify="right")
        table.add_column("class", justify="right")
        table.add_column("name")
        for entry in photo["top"]:
            table.add_row(f"{entry['probability']:.2%}", str(entry["class"]), entry["name"])
        out.print(photo["photo"], soft_wrap=True)
        out.print(table)
        out.print(f"largest difference of the logits to the unfused model: {photo['max_abs_diff']:.1e}")
    out.print(f"{document['model']} ({document['weights']}) on {document['device']}, {document['classes']} classes")
    if document["attention_map"]:
        out.print(f"attention maps: {document['attention_map']}")
