"""What a run draws with: model folders, hub ids, or a folder of pictures that another system made."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterable, Set
from pathlib import Path

import torch

from cascade import Cascade, __version__, checkpoint
from cascade.config import to_dict
from cascade.errors import InputError
from cascade.images import save_png, to_pil
from cascade.pipeline import EMBEDDED
from eval.pictures import load_picture, picture_size
from eval.run import DEFAULT, PICTURES, Item, Key, Model, Plan, picture_seeds
from eval.suites import Suite

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
THE_DEFAULT = "the embedded default"  # path of a model that came without one
ELSEWHERE = "picture"  # the one stage of pictures made elsewhere
FORMS = {  # of file names, relative to the folder: prompt (from 0) and, where there are several, k (from 0)
    "0017-0.png or 0017.png": r"(?P<prompt>\d+)(?:[-_](?P<k>\d+))?",
    "00017/samples/0000.png (GenEval)": r"(?P<prompt>\d+)/samples/(?P<k>\d+)",
    "PROMPT_000017.png (T2I-CompBench)": r"[^/]*[^/\d]_(?P<prompt>\d{6})",
}
Found = dict[tuple[int, int], Path]  # (prompt, k) -> picture


def is_model(source: str | None) -> bool:
    """Whether this is a model and no folder of pictures. A folder with neither is called a model, whose
    loader says what it lacks."""
    folder = Path(source or EMBEDDED)
    return not folder.is_dir() or (folder / checkpoint.INDEX).exists() or not _pictures(folder)


def load_model(source: str | None, device: torch.device) -> tuple[Cascade, Model]:
    """A cascade on `device`, and what a run records of it. None: the embedded default."""
    pipe = Cascade.from_pretrained(source, device=device)
    folder = checkpoint.resolve_source(EMBEDDED if source is None else source)
    index = checkpoint.read_index(folder)
    files = index.sha256 or {
        path.relative_to(folder).as_posix(): checkpoint.sha256(path)
        for name in (*index.components, checkpoint.TEXT_ENCODER)
        for path in sorted((folder / name).rglob("*"))
        if path.is_file()
    }
    identity = json.dumps([index.components, index.text_encoder, files], sort_keys=True)
    sampling = {name: to_dict(stage.config.sampling) for name, stage in pipe.stages.items()}
    model = Model(
        name=folder.resolve().name if Path(source or EMBEDDED).is_dir() else str(source),
        path=THE_DEFAULT if source is None else str(source),
        sha256=hashlib.sha256(identity.encode()).hexdigest(),
        kind="cascade",
        stages={name: stage.config.image_px for name, stage in pipe.stages.items()},
        config={"text_encoder": index.text_encoder, "sampling": sampling},
        device=device.type,
        dtype=str(next(iter(pipe.stages.values())).dtype).removeprefix("torch."),
    )
    return pipe, model


def model_source(model: Model) -> str | Path:
    """Where a run's model is loaded from again."""
    return EMBEDDED if model.path == THE_DEFAULT else model.path


def find_pictures(source: str, suite: Suite, per_prompt: int) -> tuple[Model, Found]:
    """The pictures of a suite in a folder that another system filled, named in one of `FORMS`; pictures
    beyond `per_prompt` are left out. Raises InputError where a name tells no prompt, a prompt lacks pictures,
    or sizes differ."""
    folder, found = Path(source), Found()
    files = _pictures(folder)
    form = next((form for form in FORMS.values() if re.fullmatch(form, _stem(folder, files[0]))), None)
    for path in files:
        match = re.fullmatch(form, _stem(folder, path)) if form else None
        if match is None:
            raise InputError(
                f"{path}: expected names that tell the prompt, all as {', or all as '.join(FORMS)}"
            )
        place = int(match["prompt"]), int(match.groupdict().get("k") or 0)
        if place in found:
            raise InputError(f"{path} and {found[place]} are both picture {place[1]} of prompt {place[0]}")
        found[place] = path
    for prompt in range(len(suite.prompts)):
        for k in range(per_prompt):
            if (prompt, k) not in found:
                raise InputError(
                    f"{folder} has no picture {k} of prompt {prompt}: expected {per_prompt} of each"
                )
    wanted = {
        (p, k): path for (p, k), path in sorted(found.items()) if p < len(suite.prompts) and k < per_prompt
    }
    px = _one_size(wanted.values())
    digest = hashlib.sha256("".join(checkpoint.sha256(path) for path in wanted.values()).encode()).hexdigest()
    model = Model(
        name=folder.resolve().name, path=source, sha256=digest, kind="pictures", stages={ELSEWHERE: px}
    )
    return model, wanted


def take_in(folder: Path, plan: Plan, name: str, found: Found, there: Set[Key]) -> list[Item]:
    """Copy pictures made elsewhere into a run, as PNG; the items that were not there. Each setting's item has
    the same files: there is nothing that a setting could change."""
    items, seeds = [], picture_seeds(plan)
    for (index, k), path in found.items():
        settings = [setting.id for setting in plan.settings if (name, setting.id, index, k) not in there]
        if not settings:
            continue
        file = f"{PICTURES}/{name}/{DEFAULT}/{ELSEWHERE}/{index:04d}-{k}.png"
        save_png(to_pil(load_picture(path)[None])[0], folder / file)
        digest, prompt = checkpoint.sha256(folder / file), plan.suite.prompts[index]
        items += [
            Item(
                model=name,
                setting=setting,
                prompt=index,
                k=k,
                text=prompt.text,
                category=prompt.category,
                seed=seeds[index, k],
                files={ELSEWHERE: file},
                sha256={ELSEWHERE: digest},
                overrides={},
                model_sha256=plan.models[name].sha256,
                code=plan.code,
            )
            for setting in settings
        ]
    return items


def code_version() -> str:
    """The commit of this checkout ("-dirty" where files differ from it), or the release."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        described = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        described = ""
    return described or __version__


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())


def _stem(folder: Path, path: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _one_size(paths: Iterable[Path]) -> int:
    """The longer side of the pictures in px. Raises InputError where they are not all of one size."""
    sizes = {path: picture_size(path) for path in paths}
    first, expected = next(iter(sizes.items()))
    for path, (width, height) in sizes.items():
        if (width, height) != expected:
            shown = f"{width}x{height} px, {first} {expected[0]}x{expected[1]}"
            raise InputError(f"{path} is {shown}: expected pictures of one size")
    return max(expected)
