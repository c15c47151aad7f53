"""The baseline DMD2 and the sibling papers DMDR and AdvDMD: one file for each method.

A method's file has Settings (its flags, and its values of the common ones), prepare(nets) (adds its networks) and
iterate(nets, batch, n) (its lines 5-26 of Algorithm 1). It loads torch, so it is imported only where --method names it.
DMDR's cold start and reward, and the policy that it shares with AdvDMD, have files of their own.
"""

from importlib import import_module

from engine.config import Config


def sibling(method):
    """The module of a method: "dmd2", "dmdr" or "advdmd"."""
    return import_module(f"siblings.{method}")


def settings_of(method):
    """The class of a method's settings: Config, or the Settings of its own file."""
    return Config if method == "flash" else sibling(method).Settings
