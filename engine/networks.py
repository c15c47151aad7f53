"""The networks of a run: lines 1-3 of Algorithm 1, and stage 2's reference and reward model."""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from math import inf

import torch
from torch.distributed.fsdp import FSDPModule

from diffusion import guided
from engine import base_model, checkpoint, reward_layout, run_folder, text_cache
from engine.distributed import adamw, average_gradients, shard, update, weights
from engine.models import Denoiser, add_lora, at_work, load_denoiser, load_sam, load_schedule, load_vae
from engine.prompts import encoder_of
from engine.quantize import int8
from engine.reward_model import backbone, load_reward_model

LORAS = {
    "teacher": {"student": 0.0, "fake": 0.0},
    "G": {"student": 1.0, "fake": 0.0},
    "fake": {"student": 0.0, "fake": 1.0},
}


@dataclass
class Networks:
    """The networks of a run and the objects that they use. `players` are those with an optimizer."""

    config: object
    ranks: int
    latent: torch.Tensor  # (B, C, h, w) of this rank: only its shape and device are used
    encoder: object  # of prompts
    vae: object  # V
    teacher: object  # μ_real; unguided
    guided_teacher: object
    null: dict  # the null prompt's condition
    G: object
    fake: object  # μ_fake, the score estimator
    S: torch.Tensor  # τ_K > ... > τ_1
    sharded: bool = False
    prompts: list = ()  # with --cache-text: every prompt of the run
    D: object = None  # the method's discriminator, where it has one
    ref: object = None  # stage 2: p_ref, the frozen stage-1 student
    R: object = None  # the reward model: stage 2's, or DMDR's
    trained: dict = field(default_factory=dict)  # name -> (module, learning rate, name of its LoRA or "")
    rewarding: tuple = ()  # AdvDMD: the score estimator and head whose logits are its reward
    players: dict = field(default_factory=dict)  # name -> (module, optimizer)
    steps: Counter = field(default_factory=Counter)  # (name, whether it stepped) -> how often so far

    def __post_init__(self):
        self.denoisers = [self.G, self.fake, self.teacher]  # their passes are counted

    # ---------------------------------------------------------------------------------- in an iteration

    def step(self, name, loss, max_norm=inf):
        """One optimizer step of a player -> (gradient norm, whether it stepped).

        All ranks skip it if the loss or a gradient is not finite on one of them. A network that FSDP2 does not shard (a
        discriminator's heads) is whole on every rank and uses the ranks' mean gradient.
        """
        module, optimizer = self.players[name]
        if not isinstance(module, FSDPModule):
            average_gradients(module, self.ranks)
        with at_work(f"the optimizer step of {name}"):
            norm, stepped = update(optimizer, loss, max_norm)
        self.steps[name, stepped] += 1
        return norm, stepped

    def weights(self, name):
        """The trained parameters of a player, in the order of its network's parameters."""
        return weights(self.players[name][1])

    def forget(self, name):
        """Drop a player's gradients."""
        for p in self.weights(name):
            p.grad = None

    def pace(self, loop, factor=1.0):
        """Set a loop's learning rates: all rise by --warmup.

        G's (RL's too) and the score estimator's fall by --lr-schedule too, and are multiplied by `factor`.
        """
        config = self.config
        warm = min(1.0, loop / config.warmup) if config.warmup else 1.0
        factor = factor * warm
        if config.lr_schedule == "linear":
            factor = factor * (1 - (loop - 1) / config.iterations)
        rates = {"G": config.lr * factor, "fake": config.fake_lr * factor, "G, RL": config.rl_lr * factor}
        rates |= {name: self.trained[name][1] * warm for name in self.trained if name not in rates}
        for name, rate in rates.items():
            if name not in self.players:
                continue
            for group in self.players[name][1].param_groups:
                if torch.is_tensor(group["lr"]):  # torchao's
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def like(self, batch):
        """A tensor of the shape of a batch's latents, (B, C, h, w); its values are undefined."""
        return self.latent[: len(batch.samples)]

    def latents(self, x_real):
        """The latents of x_real; x_real itself where it is cached latents, which have more channels than pictures."""
        return x_real if x_real.shape[1] > 3 else self.vae.encode(x_real)

    @torch.no_grad()
    def pictures(self, x_real):
        """x_real, decoded where it is cached latents, in [-1, 1]."""
        return self.vae.decode(x_real).clamp(-1, 1) if x_real.shape[1] > 3 else x_real

    def passes(self):
        """Passes of the counted denoisers on this rank so far, in samples, without stage 2's other networks."""
        return sum(denoiser.passes for denoiser in self.denoisers)

    # --------------------------------------------------------------------------------- when they are made

    @property
    def dtype(self):
        """The dtype that the denoisers compute in."""
        return self.G.dtype

    def add(self, name, module, rate):
        """A network of the method's own, trained at `rate` from now on -> the network, on the device."""
        self.trained[name] = (module.to(self.latent.device), rate, "")
        return module

    def ready(self, net):
        """Shard a network where the run is sharded -> it. Call it after each load: no two are then whole on a GPU."""
        return shard(net, self.dtype) if self.sharded else net

    def frozen(self, denoiser):
        """A denoiser that is not trained, ready for use."""
        freeze(denoiser.net, self.dtype)
        self.ready(denoiser.net)
        return denoiser

    def sam(self):
        """Pixel-GAN's image encoder."""
        return load_sam(self.config.sam, self.latent.device, self.dtype)

    def load_reward(self):
        """The latent reward model. Raises UserError for one of other latents than the model's."""
        config = self.config
        path = reward_layout.reward_folder(config)
        device = self.latent.device
        R = load_reward_model(path, config.resolution, config.model, device, self.dtype, self.encoder)
        self.ready(backbone(R))
        if config.cache_text:
            text_cache.fill(R.encoder, self.prompts, config.cache_text)
        return R


def assemble(config, ranks, device, prepare=None, source=None):
    """Algorithm 1, lines 1-3, and in stage 2 the reference and the reward model -> Networks.

    prepare(nets): adds the method's networks, a discriminator or a LoRA, before the score estimator is sharded; source:
    of the data, whose prompts --cache-text encodes before any other network is loaded.
    Raises UserError for settings that do not fit the model.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder = encoder_of(vars(config), device, dtype, loaded=not config.cache_text)
    if config.quantize_frozen:
        for net in encoder.encoders:  # none with --cache-text: conditions that are kept are the whole encoders'
            int8(net)
    prompts = ()
    if config.cache_text:
        prompts = text_cache.prompts_of(config, source, encoder.family.EMPTY)
        text_cache.fill(encoder, prompts, config.cache_text)
    vae = load_vae(config.model, device)
    base_model.check_settings(config, encoder.family, vae.factor)
    side = config.resolution // vae.factor
    latent = torch.empty(config.batch_size // ranks, vae.channels, side, side, device=device)
    sharded = ranks > 1 or device.type == "cuda"

    torch.manual_seed(config.seed)
    load = partial(load_denoiser, config.model, device, dtype, resolution=config.resolution)
    shared = config.lora_rank and not config.teacher  # teacher, G and score estimator are one network with two LoRAs
    how = {"resolution": config.resolution, "name": "the teacher", "weights": dtype}
    teacher = load_denoiser(config.teacher or config.model, device, dtype, **how)
    schedule = teacher.schedule = load_schedule(config.model, config.resolution)
    if not shared:
        freeze(teacher.net, dtype)
        if config.quantize_frozen:
            int8(teacher.net)
        if sharded:
            shard(teacher.net, dtype)
    if config.lora_rank:
        net = teacher.net if shared else load(name="the generator G", weights=dtype).net
        if config.quantize_frozen:
            int8(net)
        add_lora(net, config.lora_rank, "student", "fake", dtype=dtype)
        if shared:
            teacher = Denoiser(net, schedule, dtype, LORAS["teacher"], "the teacher")
        G = Denoiser(net, schedule, dtype, LORAS["G"], "the generator G")  # line 1
        fake = Denoiser(net, schedule, dtype, LORAS["fake"], "the score estimator")  # line 2
    else:
        G = load(name="the generator G")  # line 1
        if sharded:
            shard(G.net, dtype)
        fake = load(name="the score estimator")  # line 2

    S = schedule.steps(config.student_steps)
    null = encoder.null()
    at_scale = guided(teacher, null, config.guidance)
    nets = Networks(config, ranks, latent, encoder, vae, teacher, at_scale, null, G, fake, S, sharded, prompts)
    nets.trained["G"] = (G.net, config.lr, "student" if config.lora_rank else "")
    nets.trained["fake"] = (fake.net, config.fake_lr, "fake" if config.lora_rank else "")
    if prepare:
        prepare(nets)  # line 3
    nets.ready(fake.net)
    for net in dict.fromkeys((G.net, fake.net)):
        net.train()
    if config.checkpointing:
        for net in (G.net, fake.net, vae.net):
            net.enable_gradient_checkpointing()
    if config.compile:
        for net in (G.net, fake.net, teacher.net):
            net.compile()
    for name, (module, rate, lora) in nets.trained.items():
        nets.players[name] = (module, optimizer_of(module, rate, config, lora))
    if config.stage == 2:
        add_stage_2(nets)
    return nets


def add_stage_2(nets):
    """In place: the stage-1 run's weights, p_ref, R, and G's second optimizer."""
    config = nets.config
    device = nets.latent.device
    checkpoint.restore(config.init, nets.players, optimizers=False)
    stage_1 = run_folder.newest(config.init)
    how = {"student": stage_1, "name": "the reference", "resolution": config.resolution}
    nets.ref = nets.frozen(load_denoiser(config.model, device, nets.dtype, **how))
    module, _, lora = nets.trained["G"]
    nets.players["G, RL"] = (module, optimizer_of(module, config.rl_lr, config, lora))
    nets.R = nets.load_reward()


def optimizer_of(module, rate, config, lora=""):
    """AdamW over the trained parameters of a module: all of them, or those of the LoRA of this name."""
    trained = [p for name, p in module.named_parameters() if p.requires_grad and (not lora or f".{lora}." in name)]
    return adamw(trained, rate, config)


def freeze(net, dtype):
    """In place: no gradients, evaluation mode, and weights in `dtype`."""
    (net.bfloat16() if dtype == torch.bfloat16 else net).eval().requires_grad_(False)
