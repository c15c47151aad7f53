"""AdvDMD's --judge: the discriminator of a run that has ended, frozen, as the reward."""

from engine import checkpoint
from engine.errors import UserError
from engine.models import add_lora, load_denoiser
from engine.networks import LORAS
from engine.run_folder import find_run
from siblings import dmd2


def frozen_discriminator(nets):
    """(score estimator, head) of run --judge, frozen. Raises UserError for a run without them."""
    config = nets.config
    run, before = find_run(config.judge, stage=1)
    fits = before["method"] in ("dmd2", "advdmd") and before["gan_weight"]
    if not fits or (before["model"], before["resolution"]) != (config.model, config.resolution):
        raise UserError(f"--judge {run}: needs a run with --method dmd2 or advdmd of {config.model}, of the same size")
    fake = load_denoiser(config.model, nets.latent.device, nets.dtype, name="the frozen discriminator")
    player = "fake"
    if before.get("lora_rank"):
        add_lora(fake.net, before["lora_rank"], "student", "fake", dtype=nets.dtype)
        fake.scales = LORAS["fake"]
        player = "G"  # the checkpoint has the network that G and the score estimator share once, under this name
    kind, where = before.get("head", "scaled"), before.get("d_block", "middle")
    head = dmd2.new_head(nets, fake, kind, where).to(nets.latent.device)
    checkpoint.restore(run, {player: (fake.net, None), "head": (head, None)}, optimizers=False)
    return nets.frozen(fake), head.requires_grad_(False)
