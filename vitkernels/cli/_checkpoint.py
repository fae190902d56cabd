"""Weights for ``vitkernels classify``: a checkpoint file, or timm's pretrained weights with a bounded wait."""

import argparse
import pickle
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _models
from ._output import CommandError

_HUB_SECONDS = 5.0
_NESTED_UNDER = ("state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")


def model_from_file(name: str, file: str) -> nn.Module:
    """timm's ``name`` with the weights in ``file``; its head has as many classes as the checkpoint's.

    Raises:
        CommandError: no such file, not a checkpoint, or one that does not fit.
    """
    import timm

    path = Path(file)
    if not path.is_file():
        raise CommandError(f"checkpoint {file}: no such file")
    state = _read(path)
    head = getattr(timm.get_pretrained_cfg(name), "classifier", None) or "head"
    head = head if isinstance(head, str) else head[0]
    if f"{head}.weight" not in state or state[f"{head}.weight"].dim() == 0:
        raise CommandError(f"checkpoint {file} has no {head}.weight: it is not a classifier, or not a {name}")
    model = _models.create(name, num_classes=state[f"{head}.weight"].shape[0])
    _check_fit(file, name, state, model.state_dict())
    model.load_state_dict(state)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content: Any
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # timm's training script stores its argparse.Namespace beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CommandError(f"checkpoint {path} cannot be read as weights: {_first_sentence(error)}") from error
    for key in _NESTED_UNDER:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise CommandError(f"checkpoint {path} holds no state dict, neither plain nor under 'state_dict' or 'model'")
    return {_unwrapped(key): value for key, value in content.items()}


def _first_sentence(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]


def _unwrapped(key: str) -> str:
    """The name before DDP and torch.compile wrapped the model, in either order."""
    for prefix in _WRAPPERS * 2:
        key = key.removeprefix(prefix)
    return key


def _check_fit(file: str, name: str, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    reshaped = sorted(key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape)
    kinds = (("missing", missing), ("unknown", unexpected), ("of another shape", reshaped))
    problems = [f"{len(keys)} tensors {kind} ({keys[0]}{', ...' if keys[1:] else ''})" for kind, keys in kinds if keys]
    if problems:
        raise CommandError(f"checkpoint {file} does not fit {name}: {', '.join(problems)}")


def pretrained_model(name: str) -> nn.Module:
    """timm's ``name`` with its pretrained weights, from the local cache when the model hub does not answer in 5 seconds.

    Raises:
        CommandError: it has no pretrained weights, or they are neither in the cache nor within reach.
    """
    import timm
    from huggingface_hub import constants

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise CommandError(f"timm has no pretrained weights for {name}: give yours with --checkpoint FILE")
    before = constants.HF_HUB_OFFLINE
    # The hub's client retries for about a minute; offline mode makes it look in its cache only.
    constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
    try:
        model = timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # the hub's client and timm raise many types, all of which mean: no weights
        if constants.HF_HUB_OFFLINE:
            reason = "the model hub cannot be reached and they are not in the local cache"
        else:
            reason = f"{type(error).__name__}: {_first_sentence(error)}"
        raise CommandError(f"no pretrained weights for {name}: {reason}; give a file with --checkpoint FILE") from error
    finally:
        constants.HF_HUB_OFFLINE = before
    if not getattr(model, "num_classes", 0):
        raise CommandError(f"the pretrained weights of {name} have no classes: choose another model or --checkpoint FILE")
    return model


def _answers(url: str) -> bool:
    """Whether a server answers at ``url``, asked in a thread because name resolution knows no timeout."""
    answered: list[Any] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_HUB_SECONDS):
                answered.append(True)
        except urllib.error.HTTPError:  # also an answer
            answered.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    return bool(answered)
