"""Where a model's files are: bundled assets, local folders, hub ids with a pinned revision."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


def model_folder(model: str, revision: str, field: str) -> Path:
    """The local folder of `model`: `asset:NAME`, a folder, or a hub id at `revision`. Raises ValueError naming `field`."""
    if model.startswith("asset:"):
        folder = ASSETS / model.removeprefix("asset:")
        if not folder.is_dir():
            raise ValueError(f"{field}: no bundled model {model!r} in {ASSETS}; make one with: aot-fast bootstrap tiny")
        return folder
    if Path(model).is_dir():
        return Path(model)
    if not revision:
        raise ValueError(f"{field}: {model!r} is not a folder; a hub id needs a pinned commit in {field.removesuffix('model')}revision")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision))
