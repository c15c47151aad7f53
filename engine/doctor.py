"""Is a run healthy? Ten rules, each the sign of one disease in what a run has logged, with its remedy. No torch here.

A rule's docstring is its sign, as docs/health.md prints it. It looks at a run -> what it sees, a part of a sentence, or
None. Limits are ratios that hold for any model; two of a toy run's are those of healthy toy runs (`most`).
"""

import math
from collections import namedtuple

from engine.errors import UserError
from engine.run_log import LEAST, average, late, most, read, window

Finding = namedtuple("Finding", "disease seen remedy")


# ------------------------------------------------------------------------------------------------- the rules
# NaN, which stands for too little to judge by, compares with no limit.


def skips(run):
    """`skipped_updates` above 1 % of the loops; 10 in a row end the run"""
    skipped = run.last.get("skipped_updates", 0)
    if skipped and skipped >= 0.01 * run.loops:
        broken = [name for name, value in run.last.items() if not math.isfinite(value)]
        named = f" (not finite: {', '.join(broken)})" if broken else ""
        return f"{skipped:.0f} of {run.loops} loops skipped an update{named}"


def unmoved(run):
    """no update of G in 20 loops; or the same `diversity`, to four digits, at every preview"""
    updates = run.last.get("generator_updates", 0) + run.last.get("rl_updates", 0)
    if not updates and run.loops >= 20:
        return f"{run.loops} loops and no update of G"
    seen = [v for _, v in run.points("diversity")]
    if len(seen) > 1 and max(seen) - min(seen) <= 1e-4 * max(seen):
        return f"after {updates:.0f} updates of G all previews show the same pictures (diversity {seen[-1]:.4f})"


def too_fast(run):
    """`latent_std_ratio` outside 0.5 to 2"""
    ratio = late(run, "latent_std_ratio")
    if ratio < 0.5 or ratio > 2:
        return f"the spread of G's latents is {ratio:.2f} times that of real ones (healthy is 0.5 to 2)"


def lags(run):
    """`score_lag` above four times what the run began with; on the toy above healthy runs"""
    points = run.points("score_lag")
    begin = average([v for _, v in points[: len(points) // 4]], "score_lag")
    lag, high = late(run, "score_lag"), most(run, "score_lag", 4 * begin)
    if lag > high:
        return f"score_lag is {lag:.3g} (healthy is at most {high:.3g})"


def too_strong(run):
    """`d_accuracy` above 0.95, or `d_loss` below a tenth of its value at chance: G gets no useful gradient"""
    accuracy, loss = late(run, "d_accuracy"), late(run, "d_loss_ratio")
    if accuracy > 0.95 or loss < 0.1:
        return f"d_accuracy is {accuracy:.2f} (healthy is 0.6 to 0.95), d_loss {loss:.0%} of its value at chance"


def blind(run):
    """`d_accuracy` below 0.58 and `d_loss` within 5 % of its value at chance (hinge 2, logistic 1.39)"""
    accuracy, loss = late(run, "d_accuracy"), late(run, "d_loss_ratio")
    if accuracy < 0.58 and loss > 0.95:
        return f"d_accuracy is {accuracy:.2f} (healthy is 0.6 to 0.95), d_loss {loss:.0%} of its value at chance"


def saturated(run):
    """`saturation` above 1.5 times `saturation_real`; on the toy above healthy runs"""
    ratio, high = late(run, "saturation_ratio"), most(run, "saturation_ratio", 1.5)
    if ratio > high:
        return f"saturation is {ratio:.2f} times that of real pictures (healthy is at most {high:.3g})"


def alike(run):
    """`diversity` or `watch_diversity` below half of the teacher's: mode collapse"""
    for signal, what in (("watch_diversity_ratio", "CLIP features"), ("diversity_ratio", "pixels")):
        seen = run.last.get(signal, math.nan)
        if seen < 0.5:
            differ = f"pictures of one prompt differ {seen:.2f} times as much as the teacher's"
            return f"{differ}, in {what} (healthy is above 0.5)"


def hacks(run):
    """stage 2: since a judge's best preview the reward has risen, and that judge fallen by two standard errors"""
    for judge in ("held_out_prompt_accuracy", "held_out_clip_score"):
        needed = [f"{name}{error}" for name in ("held_out_reward", judge) for error in ("", "_error")]
        looks = [row for row in run.rows if all(math.isfinite(row.get(name, math.nan)) for name in needed)]
        best = max(looks, key=lambda look: look[judge], default=None)
        if best and change(best, looks[-1], "held_out_reward") > 0 and change(best, looks[-1], judge) < -2:
            rise, fall = (f"{best[name]:.3f} to {looks[-1][name]:.3f}" for name in ("held_out_reward", judge))
            return f"held_out_reward rises ({rise}), {judge} falls ({fall})"


def change(before, after, name):
    """How far a score has moved between two previews, in standard errors of the difference."""
    error = math.hypot(before[f"{name}_error"], after[f"{name}_error"])
    return (after[name] - before[name]) / max(error, 1e-6)


def gate_shut(run):
    """AdvDMD: `rl_open` below 0.1, or the run's end before `--rl-after`"""
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
    "over-saturation": (saturated, "lower --guidance, keep --ema below 1: pure distribution matching drifts there"),
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


def report(run, found, picture):
    """What doctor.py prints: a line on the run, which names its picture, and one for each finding."""
    early = not any(window(run, signal) for signal in ("dm_loss", "rl_loss"))
    what = f"too early to say, before {2 * LEAST} lines of metrics.jsonl" if early else "healthy"
    what = f"{len(found)} of {len(DISEASES)} diseases" if found else what
    head = f"{run.folder}, {run.loops} of {run.config['iterations']} loops: {what} (curves: {picture})"
    return "\n".join([head, *map(sentence, found)])


def sentence(finding):
    return f"{finding.disease}: {finding.seen}. {finding.remedy[0].upper()}{finding.remedy[1:]}."


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
