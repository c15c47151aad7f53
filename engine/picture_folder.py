"""A folder of pictures for a list of prompts, drawn in one go or in several. Nothing here loads torch.

DIR/settings.json      what the pictures depend on, their prompts among it
DIR/00000.png ...      one per prompt, written when it is drawn (engine/prompt_set.py: other names)
DIR/lock               of engine/locks.py, held while they are drawn
"""

import json
from pathlib import Path

from engine.errors import UserError
from engine.folders import check_writable
from engine.locks import check_free, lock, unlock


def numbered(i):
    """The name of the i-th picture in its folder."""
    return f"{i:05d}.png"


def picture(folder, i, name=numbered):
    """The file of the i-th picture."""
    return Path(folder) / name(i)


def missing(folder, n, name=numbered):
    """Which of the pictures 0 .. n - 1 are not there."""
    return [i for i in range(n) if not picture(folder, i, name).is_file()]


def settings_of(folder, flag):
    """What a folder's pictures were begun with, a dict; {} for an empty or new folder.

    flag: the one that names the folder. Raises UserError for a folder of something else, in use, or not writable.
    """
    folder = Path(folder)
    settings = folder / "settings.json"
    if folder.is_dir() and any(folder.iterdir()) and not settings.is_file():
        raise UserError(f"{folder} holds something already (and no settings.json): give another {flag}")
    check_writable(folder, flag)
    if not settings.is_file():
        return {}
    check_free(folder / "lock")
    try:
        return dict(json.loads(settings.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{settings} is torn: give another {flag}") from None


def compare(folder, before, now, flag):
    """Raises UserError where settings `now` are not those of before, the folder's, that {} stands for none of."""
    for name in before and now:
        if before.get(name) != now[name]:
            begun = f"{folder} was begun with {name} {_short(before.get(name))}, not {_short(now[name])}"
            raise UserError(f"{begun}: give another {flag}, or the settings that it was begun with")


def begin(folder, settings):
    """Make the folder, write its settings.json and hold it. Raises UserError where another process draws there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder / "lock")
    aside = folder / "settings.json.part"
    aside.write_text(json.dumps(settings, indent=1) + "\n")
    aside.rename(folder / "settings.json")


def end(folder):
    """Let other processes draw into a folder."""
    unlock(Path(folder) / "lock")


def _short(value):
    text = f"{len(value)} others" if isinstance(value, list) and len(value) > 2 else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
