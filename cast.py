"""Who plays in Algorithm 1: its lines 1-3, and stage 2's reference and reward model. For the iteration itself see train.py."""

from dataclasses import dataclass
from math import inf

import torch

import checkpoint
import dmdr
import latent_gan
import metrics
import run_folder
from diffusion import guided
from distributed import adamw, shard, update, weights
from latent_reward import LatentRewardModel
from models import Denoiser, UserError, add_lora, load_denoiser, load_encoder, load_sam, load_vae
from pixel_gan import PixelDiscriminator


@dataclass
class Cast:
    """The networks of a run, and what they share."""

    config: object
    ranks: int
    latent: torch.Tensor  # (B, C, h, w) of this rank, empty: shape and device
    encoder: object
    vae: object
    teacher: object  # μ_real, and guided
    guided_teacher: object
    null: dict  # the null prompt's condition
    G: object
    fake: object  # μ_fake
    D: object  # Pixel-GAN's, or None
    head: object  # of DMD2's latent discriminator, or None
    judge: tuple  # AdvDMD: the score estimator and head that reward: its own, online, or those of --judge, frozen
    ref: object  # p_ref, and R: stage 2
    R: object
    players: dict  # name -> (module, optimizer)
    S: torch.Tensor  # τ_K > ... > τ_1

    def update(self, name, loss, max_norm=inf):
        """One optimizer step of a player. -> (gradient norm, stepped)."""
        return update(self.players[name][1], loss, max_norm)

    def weights(self, name):
        """What a player trains."""
        return weights(self.players[name][1])

    def forget(self, name):
        """Drop a player's gradients."""
        for p in self.weights(name):
            p.grad = None

    def pace(self, factor):
        """Learning rates of G, by preference too, and of the score estimator: `factor` times those asked for."""
        for name, rate in (("G", self.config.lr), ("fake", self.config.fake_lr), ("G, RL", self.config.rl_lr)):
            for group in self.players[name][1].param_groups if name in self.players else ():
                if torch.is_tensor(group["lr"]):  # torchao's
                    group["lr"].fill_(rate * factor)
                else:
                    group["lr"] = rate * factor

    def latents(self, x_real):
        """E(x_real), or x_real itself where it is what --cache-latents has kept: latents have more channels than pictures."""
        return x_real if x_real.shape[1] > 3 else self.vae.encode(x_real)

    @torch.no_grad()
    def pictures(self, x_real):
        """x_real; where it is cached latents, V of them, in [-1, 1]."""
        return self.vae.decode(x_real).clamp(-1, 1) if x_real.shape[1] > 3 else x_real

    def passes(self):
        """Passes of G, score estimator, teacher and a frozen judge on this rank so far, in samples; not those of stage 2's other networks."""
        return sum(denoiser.passes for denoiser in {self.G, self.fake, self.teacher, self.judge[0]})


def assemble(config, ranks, device):
    """Algorithm 1, lines 1-3 (and in stage 2 the reference and the reward model) -> Cast. Raises UserError for what does not fit."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder = load_encoder(config.model, config.resolution, device, dtype)
    vae = load_vae(config.model, device)
    side, rest = divmod(config.resolution, vae.factor)
    if rest or side % 4:
        raise UserError(f"--resolution {config.resolution} must be a multiple of {4 * vae.factor}")
    if config.gan_crop % vae.factor or config.gan_crop > config.resolution:
        raise UserError(f"--gan-crop {config.gan_crop} must be a multiple of {vae.factor}, at most --resolution {config.resolution}")
    latent = torch.empty(config.batch_size // ranks, vae.channels, side, side, device=device)

    sharded = ranks > 1 or device.type == "cuda"
    ready = lambda net: shard(net, dtype) if sharded else net  # noqa: E731  one after the other: no two are whole on a GPU

    torch.manual_seed(config.seed)
    teacher = load_denoiser(config.model, device, dtype)  # μ_real
    if config.lora_rank:  # one network, three ways to wear it
        net, schedule = teacher.net, teacher.schedule
        add_lora(net, config.lora_rank, "student", "fake", dtype=dtype)
        teacher, G, fake = (Denoiser(net, schedule, dtype, {"student": a, "fake": b}) for a, b in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
        ready(net)
    else:
        freeze(teacher.net, dtype)
        ready(teacher.net)
        G = load_denoiser(config.model, device, dtype)  # line 1
        ready(G.net)
        fake = load_denoiser(config.model, device, dtype)  # line 2
        if config.fake_lora:
            add_lora(fake.net, config.fake_lora, "fake", dtype=dtype)
            fake.scales = {"fake": dmdr.FAKE_SCALE}
        ready(fake.net)
    if config.checkpointing:
        for net in (G.net, fake.net, vae.net):
            net.enable_gradient_checkpointing()
    for net in dict.fromkeys((G.net, fake.net)):
        net.train()
    if config.size_condition == "original" and teacher.net.config.get("addition_embed_type") != "text_time":
        raise UserError(f"--size-condition original: {config.model} has no size conditions, as SDXL has")
    if config.compile and config.gan != "pixel":
        raise UserError(f"--compile and --gan {config.gan} do not go together: the compiled score estimator hides its features")
    if config.compile:
        for net in (G.net, fake.net, teacher.net):
            net.compile()

    def adam(net, lr, lora=""):
        trained = [p for name, p in net.named_parameters() if p.requires_grad and (not lora or f".{lora}." in name)]
        return adamw(trained, lr, config)

    mine, fakes = ("student", "fake") if config.lora_rank else ("", "")
    players = {"G": (G.net, adam(G.net, config.lr, mine)), "fake": (fake.net, adam(fake.net, config.fake_lr, fakes))}
    D = head = None
    torch.manual_seed(config.seed)
    if config.gan == "pixel" and config.gan_weight > 0:  # line 3
        D = PixelDiscriminator(load_sam(config.sam, device, dtype), checkpointing=config.checkpointing).to(device)
        players["D"] = (D, adam(D, config.d_lr))
    if config.gan in ("latent", "online") and config.gan_weight > 0:
        if not hasattr(fake.net, "mid_block"):
            raise UserError(f"--gan {config.gan} looks at a UNet's bottleneck, which {config.model} does not have: use --gan pixel")
        head = latent_gan.Head(fake.net.config.block_out_channels[-1]).to(device)
        players["head"] = (head, adam(head, config.fake_lr))
    judge = frozen_judge(config, device, dtype, sharded) if config.judge else (fake, head)
    ref = R = None
    if config.stage == 2:
        checkpoint.restore(config.init, players, optimizers=False)
        ref = load_denoiser(config.model, device, dtype, student=run_folder.newest(config.init))  # p_ref
        freeze(ref.net, dtype)
        ready(ref.net)
        players["G, RL"] = (G.net, adam(G.net, config.rl_lr, mine))
    if config.stage == 2 or config.reward_weight:
        if config.reward == "clip" and config.stage == 1:
            R = metrics.Clip(config.clip, device)
        else:
            R = load_reward(config, vae, device, dtype)
            ready(R.unet)
    S, null = teacher.schedule.steps(config.student_steps), encoder.null()  # τ_K > ... > τ_1
    at_scale = guided(teacher, null, config.guidance)
    return Cast(config, ranks, latent, encoder, vae, teacher, at_scale, null, G, fake, D, head, judge, ref, R, players, S)


def load_reward(config, vae, device, dtype):
    """The latent reward model. Raises UserError for one of another latent width."""
    folder = run_folder.reward_folder(config)
    R = LatentRewardModel.from_pretrained(folder, config.resolution, config.model, device, dtype)
    if (channels := R.unet.config.in_channels) != vae.channels:
        raise UserError(f"the reward model in {folder} judges latents of {channels} channels, those of {config.model} have {vae.channels}")
    return R


def frozen_judge(config, device, dtype, sharded):
    """AdvDMD's D as run --judge left it: (score estimator, head), trained no more. Raises UserError for a run without one."""
    run, before = run_folder.find_run(config.judge, stage=1)
    before = run_folder.DEFAULTS | before
    judges = before["gan"] in ("latent", "online") and before["gan_weight"]
    if not judges or before["model"] != config.model or before["lora_rank"] or before["fake_lora"]:
        raise UserError(f"--judge {run}: needs a run with --gan latent or online of {config.model}, without LoRAs")
    fake = load_denoiser(config.model, device, dtype)
    head = latent_gan.Head(fake.net.config.block_out_channels[-1]).to(device)
    checkpoint.restore(run, {"fake": (fake.net, None), "head": (head, None)}, optimizers=False)
    freeze(fake.net, dtype)
    head.requires_grad_(False)
    if sharded:
        shard(fake.net, dtype)
    return fake, head


def freeze(net, dtype):
    """In place: no gradients, evaluation mode, and the memory of `dtype`."""
    (net.bfloat16() if dtype == torch.bfloat16 else net).eval().requires_grad_(False)
