"""Is a run healthy? Rules that each find one disease in a run's log, in a sentence with its remedy. No torch here.

Their limits are ratios that hold for any model. For a toy run the bands of healthy toy runs take the place of some.
"""

import math
from collections import namedtuple

from engine.errors import UserError
from engine.run_log import LEAST, average, late, limits, read, window

Finding = namedtuple("Finding", "disease seen remedy")


# ------------------------------------------------------------------------------------------------- the rules
# Each looks at a run -> what it sees, a part of a sentence; None where it sees nothing. NaN compares with no limit.


def between(low, high):
    """How a finding says what healthy runs have."""
    return f"healthy is at most {high:.3g}" if low == -math.inf else f"healthy is {low:.3g} to {high:.3g}"


def skips(run):
    skipped = run.last.get("skipped_updates", 0)
    if skipped and skipped >= 0.01 * run.loops:
        broken = [name for name, value in run.last.items() if not math.isfinite(value)]
        named = f" (not finite: {', '.join(broken)})" if broken else ""
        return f"{skipped:.0f} of {run.loops} loops skipped an update{named}"


def unmoved(run):
    updates = run.last.get("generator_updates", 0) + run.last.get("rl_updates", 0)
    if not updates and run.loops >= 20:
        return f"{run.loops} loops and no update of G"
    seen = [v for _, v in run.points("diversity")]
    if len(seen) > 1 and max(seen) - min(seen) <= 1e-4 * max(seen):
        return f"after {updates:.0f} updates of G all previews show the same pictures (diversity {seen[-1]:.4f})"


def too_fast(run):
    ratio = late(run, "latent_std_ratio")
    low, high = 0.5, 2.0
    if not low <= ratio <= high and not math.isnan(ratio):
        return f"the spread of G's latents is {ratio:.2f} times that of real ones ({between(low, high)})"


def lags(run):
    lag = late(run, "score_lag")
    begin = average([v for p, v in run.points("score_lag")[: len(run.points("score_lag")) // 4]], "score_lag")
    low, high = limits(run, "score_lag", high=4 * begin)
    if lag > high:
        return f"score_lag is {lag:.3g} ({between(low, high)})"


def too_strong(run):
    accuracy, loss = late(run, "d_accuracy"), late(run, "d_loss_ratio")
    if accuracy > 0.95 or loss < 0.1:
        return f"d_accuracy is {accuracy:.2f} (healthy is 0.6 to 0.95)"


def blind(run):
    accuracy, loss = late(run, "d_accuracy"), late(run, "d_loss_ratio")
    if accuracy < 0.58 and loss > 0.95:
        return f"d_accuracy is {accuracy:.2f} (healthy is 0.6 to 0.95), d_loss {loss:.0%} of its value at chance"


def saturated(run):
    ratio = late(run, "saturation_ratio")
    low, high = limits(run, "saturation_ratio", high=1.4)
    if ratio > high:
        return f"saturation is {ratio:.2f} times that of real pictures ({between(low, high)})"


def alike(run):
    for signal, what in (("watch_diversity_ratio", "CLIP features"), ("diversity_ratio", "pixels")):
        seen = run.last.get(signal, math.nan)
        if seen < 0.5:
            differ = f"pictures of one prompt differ {seen:.2f} times as much as the teacher's"
            return f"{differ}, in {what} (healthy is above 0.5)"


def hacks(run):
    looks = [row for row in run.rows if "held_out_reward" in row][-4:]
    steps = list(zip(looks, looks[1:]))
    if len(steps) < 3 or not all(b["held_out_reward"] > a["held_out_reward"] for a, b in steps):
        return None
    path = lambda name: ", ".join(f"{look[name]:.3f}" for look in looks)  # noqa: E731
    for judge in ("held_out_prompt_accuracy", "held_out_clip_score"):
        error = f"{judge}_error"
        if all(error in look for look in looks) and all(b[judge] < a[judge] - a[error] for a, b in steps):
            return f"held_out_reward rises ({path('held_out_reward')}), {judge} falls ({path(judge)})"


def gate_shut(run):
    config = run.config
    if config["method"] != "advdmd" or not config["gan_weight"]:
        return None
    opened = late(run, "rl_open")
    if opened < 0.1:
        return f"rl_open is {opened:.2f}: D tells {late(run, 'd_accuracy_unseen'):.2f} of unseen latents right"
    if run.loops >= config["iterations"] and not run.points("rl_open"):
        updates = run.last.get("generator_updates", 0)
        return f"G has had {updates:.0f} updates, and reinforcement begins after {config['rl_after']}"


DISEASES = {  # name: (rule, remedy); a run with one of FIRST is told nothing else: it explains the rest
    "NaN skips": (skips, "lower --lr, --fake-lr and --rl-lr, or --gan-weight"),
    "G never moved": (unmoved, "raise --lr, lower --ttur, or give more --iterations"),
    "rates too high": (too_fast, "lower --lr and --fake-lr"),
    "score estimator lagging": (lags, "raise --ttur or --fake-lr, lower --lr, or --ema"),
    "D too strong": (too_strong, "lower --d-lr, or --gan-reals vae: D may win on what the VAE cannot draw"),
    "D blind": (blind, "raise --d-lr (--fake-lr, --critic-weight with --method dmd2 or advdmd)"),
    "over-saturation": (saturated, "lower --guidance, keep --ema below 1"),
    "diversity falling": (alike, "lower --lr or --guidance, raise --ttur or --gan-weight"),
    "reward hacking": (hacks, "raise --beta, lower --rl-lr or --rl-ratio"),
    "RL gate never open": (gate_shut, "lower --rl-gate or --rl-after, raise --fake-lr or --critic-weight"),
}
FIRST = ("NaN skips", "G never moved", "rates too high")


def examine(run):
    """What is wrong with a run -> [Finding], in the order of DISEASES."""
    found = []
    for disease, (rule, remedy) in DISEASES.items():
        seen = rule(run)
        if seen:
            found.append(Finding(disease, seen, remedy))
        if seen and disease in FIRST:
            break
    return found


# ------------------------------------------------------------------------------------------------ the report


def report(run, found):
    """What doctor.py prints: a line on the run, one for each finding."""
    kind = f"{run.config['method']}, stage {run.config['stage']} of {run.config['model']}"
    against = "rules and healthy toy runs" if run.bands else "rules that hold for any model"
    lines = [f"{run.folder}: {kind}, {run.loops} of {run.config['iterations']} loops, by {against}"]
    lines += map(sentence, found)
    if not found and not any(window(run, signal) for signal in ("dm_loss", "rl_loss")):
        lines.append(f"too early: rules want {2 * LEAST} lines of metrics.jsonl")
    elif not found:
        lines.append("healthy: no rule finds anything")
    return "\n".join(lines)


def sentence(finding):
    return f"{finding.disease}: {finding.seen}. {finding.remedy[0].upper()}{finding.remedy[1:]}"


def warning(folder):
    """A run's findings in one line, for its previews; None where there are none."""
    try:
        found = examine(read(folder))
    except UserError:  # somebody has changed the folder's files: no reason to end the run
        return None
    if not found:
        return None
    others = "".join(f"; {f.disease} too" for f in found[1:])
    first = found[0]
    return f"warning: {first.disease}? {first.seen}: {first.remedy}{others} (python doctor.py {folder})"
