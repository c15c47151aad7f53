"""The baseline DMD2 and the sibling papers DMDR and AdvDMD: each a whole method in a file of its own.

Each file has Settings (its flags, and its own values of the common ones), prepare(nets) (what it adds to the networks) and
iterate(nets, batch, n) (its lines 5-26 of Algorithm 1). A file is imported when --method names it: it loads torch.
"""

from importlib import import_module

from engine.config import Config


def sibling(method):
    """The module of a method: "dmd2", "dmdr" or "advdmd"."""
    return import_module(f"siblings.{method}")


def settings_of(method):
    """The settings of a method, a class: Config, or the Settings of its own file."""
    return Config if method == "flash" else sibling(method).Settings
