"""What the ranks of a job do in the tests of training on several: a module of its own, so that they can import it."""

import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from steersman.kernels import choose
from steersman.parallel import Mesh, Ranks
from steersman.sae import SAE
from steersman.train import TrainConfig, Trainer
from steersman.train.mesh.selection import keep_batch_topk, keep_topk
from steersman.train.run.checkpoints import state_key
from steersman.train.run.optim import parameters_of
from support.training import mixture, trainer_of


def trained(config: TrainConfig, rows: Tensor, n_steps: int, ranks: Ranks | None = None) -> dict[str, Any]:
    """The state after `n_steps`, with this rank's part of it, and the metrics of each step."""
    trainer = trainer_of(config, rows, ranks)
    mesh = trainer.ranks.mesh
    size = trainer.recipe.batch_size
    share = size // mesh.data

    def part(step: int) -> Tensor:
        low = step % (len(rows) // size) * size + mesh.data_index * share
        return rows[low : low + share]

    if config.init is None:
        trainer.fit_encoder_scale(part(0))
    metrics = []
    for step in range(n_steps):
        trainer.step(part(step))
        metrics.append(trainer.read_metrics())
    sae = trainer.sae
    found = {name: parameter.detach().clone() for name, parameter in parameters_of(sae).items()}
    state = trainer.updater.state()
    if "rule.n_steps" in state:
        found |= {name.removeprefix("rule."): value.clone() for name, value in state.items()}
    else:
        found |= {f"{name}.adam": state[f"adam.{state_key(name)}.exp_avg_sq"] for name in list(found)}
    found |= {f"{name}.ema": average for name, average in trainer.ema.items()}
    found |= {name: buffer.clone() for name, buffer in sae.named_buffers()}
    found["silent_steps"] = trainer.dead_latents.silent_steps
    return {"state": found, "metrics": metrics}


def train_on_every_mesh(configs: dict[str, TrainConfig], rows: Tensor, n_steps: int, latent: int) -> dict[str, Any]:
    """{name: what `trained` gives} on the mesh of all ranks with `latent` of them sharing the latents."""
    first = next(iter(configs.values()))
    from steersman.parallel import rank_and_world_size

    rank, n = rank_and_world_size()
    mesh = Mesh.over(n, rank=rank, d_sae=first.d_sae, batch_size=first.batch_size or n, latent=latent)
    with Ranks(mesh, 60) as ranks:
        return {name: trained(replace(config), rows, n_steps, ranks) for name, config in configs.items()}


def train_on_every_mesh_late(*args: Any) -> dict[str, Any]:
    """`train_on_every_mesh`, with the number of dead latents known a step late, as on a GPU."""
    from steersman.train.run import dead_latents

    dead_latents.steps_late = lambda device: 1
    return train_on_every_mesh(*args)


def select(cases: list[tuple[Tensor, int, int]]) -> list[Any]:
    """For each (pre-activations [N, L], k, latent ranks): this rank's kept code [N, P] by both rules, with indices."""
    from steersman.parallel import rank_and_world_size

    rank, n = rank_and_world_size()
    found = []
    with Ranks(Mesh(data=1, latent=n, rank=rank), 60) as ranks:
        data_ranks = Ranks.__new__(Ranks)
        for Z, k, latent in cases:
            mesh = Mesh(data=n // latent, latent=latent, rank=rank)
            data_ranks.mesh, data_ranks.timeout = mesh, ranks.timeout
            every = list(range(n))
            on_latent = data_ranks._group([every[d * latent : (d + 1) * latent] for d in range(mesh.data)])
            on_data = data_ranks._group([every[i::latent] for i in range(latent)])
            rows = Z.chunk(mesh.data)[mesh.data_index]
            low, high = mesh.local_latents(Z.shape[1])
            eye = torch.eye(Z.shape[1])[low:high]  # pre-activations of x = Z under these rows are Z's own columns
            ops, zero = choose(torch.device("cpu")), torch.zeros(high - low)
            values, indices = ops.topk_encode(rows, eye, zero, min(k, high - low))
            kept = keep_topk(values, k, on_latent)
            topk = (torch.where(kept, values, 0.0), indices + low)
            wide = min(k * mesh.data, high - low)
            values, indices, _ = ops.batch_topk_encode(rows, eye, zero, wide)
            kept, smallest = keep_batch_topk(values, len(Z) * k, on_latent, on_data)
            found.append((topk, (torch.where(kept, values, 0.0), indices + low), smallest))
    return found


class Event:
    """Something that happens to rank `victim` when `reached` is called with `at`: preempt, kill or hang."""

    def __init__(self, what: str, at: int, victim: int) -> None:
        self.what, self.at, self.victim = what, at, victim
        self.since = time.monotonic()

    def reached(self, number: int) -> None:
        from steersman.parallel import rank_and_world_size

        if number == self.at:
            self.since = time.monotonic()
            if rank_and_world_size()[0] == self.victim:
                signals = {"preempt": signal.SIGTERM, "kill": signal.SIGKILL, "hang": signal.SIGSTOP}
                os.kill(os.getpid(), signals[self.what])

    def end_of(self, train: Callable[[], SAE]) -> tuple[str, float, Any]:
        """How the run ended, the seconds from the event to the end, and the metadata of what was trained."""
        from steersman.errors import LostRankError, PreemptedError

        step = Trainer.step

        def eventful(self: Trainer, rows: Tensor) -> None:
            reached(self.n_steps_done)
            step(self, rows)

        reached, Trainer.step = self.reached, eventful
        try:
            sae = train()
        except (LostRankError, PreemptedError) as error:
            return type(error).__name__, time.monotonic() - self.since, str(error)
        return "done", time.monotonic() - self.since, sae.cfg.metadata["heldout"]


def train(store: str, config: TrainConfig, out: str, event: str = "", at_step: int = -1, victim: int = 0) -> Any:
    """`train_sae` in a job, with something happening to rank `victim` before step `at_step`."""
    from steersman.train import ActivationStore, train_sae

    return Event(event, at_step, victim).end_of(lambda: train_sae(ActivationStore.open(store), config, out))


def train_with(modules: tuple[str, ...], *args: Any) -> Any:
    """`train` after these modules, which a process that is started anew has not, are imported."""
    for module in modules:
        import_module(module)
    return train(*args)


def train_from_stream(
    text: str, options: dict[str, Any], config: TrainConfig, out: str, event: str = "", at: int = -1, victim: int = 0
) -> Any:
    """`train_sae` on a stream of a tiny model. The event comes before step `at` of a trainer, or before forward pass
    `at` of a model rank. After how it ended comes the number of forward passes of this rank.

    Options that are not those of a stream: `load_seconds` to load the model, `step_seconds` more for a step, `broken`
    (NaN for one token), `large` (how many times as long the rows of that token are), texts for a rank of their own
    (`text_of_rank`), and whether activations travel on a `wire` of their own, as between GPUs.
    """
    from steersman.lm import LanguageModel
    from steersman.parallel import rank_and_world_size
    from steersman.train import ActivationStream, train_sae
    from support.tiny_models import with_text

    rank, options = rank_and_world_size()[0], dict(options)
    load_seconds, step_seconds = options.pop("load_seconds", 0), options.pop("step_seconds", 0)
    large, broken, texts = options.pop("large", 1.0), options.pop("broken", False), options.pop("text_of_rank", {})
    if options.pop("wire", False):
        wire_of_its_own()
    times = math.nan if broken else large
    happening, capture, take_step, passes = Event(event, at, victim), LanguageModel.capture, Trainer.step, [0]

    def counted(self: LanguageModel, input_ids: Tensor, *args: Any, **named: Any) -> Any:
        passes[0] += 1
        happening.reached(passes[0] if rank == victim else -2)
        found = capture(self, input_ids, *args, **named)
        return {hook: torch.where((input_ids == 17)[..., None], x * times, x) for hook, x in found.items()}

    def slow_step(self: Trainer, rows: Tensor) -> None:
        time.sleep(step_seconds)
        take_step(self, rows)

    def stream() -> ActivationStream:
        time.sleep(load_seconds)
        return ActivationStream(with_text("llama"), texts.get(rank, text), **options)

    LanguageModel.capture = counted  # pyright: ignore[reportAttributeAccessIssue]
    Trainer.step = slow_step
    return *happening.end_of(lambda: train_sae(stream, config, out)), passes[0]


def wire_of_its_own() -> None:
    """Have activations travel by a process group that nothing else uses, and everything that is done with them on the
    side of the device's work that is the wire's."""
    import torch.distributed as dist

    from steersman.train.mesh import model_ranks
    from steersman.train.mesh.wires import Wire

    class Watched(Wire):
        inside = 0

        @contextmanager
        def beside(self) -> Any:
            self.inside += 1
            yield
            self.inside -= 1

    wires: list[Watched] = []

    def wire(control: Wire, device: torch.device, timeout: Any) -> Wire:
        wires.append(Watched(dist.new_group(backend="gloo", timeout=timeout), torch.device("cpu")))
        return wires[0]

    def only_beside(function: Any, name: str) -> Any:
        def checked(*args: Any, **named: Any) -> Any:
            assert not wires or named.get("group") is not wires[0].group or wires[0].inside, name
            return function(*args, **named)

        return checked

    dist.isend, dist.recv = only_beside(dist.isend, "isend"), only_beside(dist.recv, "recv")
    model_ranks._wire_of_rows = wire


def written() -> int:
    """Bytes that this process has given to write calls of any kind, sockets among them."""
    with open("/proc/self/io") as counters:
        return int(next(line for line in counters if line.startswith("wchar")).split()[1])


def bytes_sent_by_model(text: str, options: dict[str, Any], config: TrainConfig, out: str) -> list[int]:
    """As `train_from_stream`; what this rank has written each time that a batch was asked of it."""
    from steersman.train.mesh import model_ranks

    answer, found = model_ranks._ModelRank._next, []

    def counted(self: Any) -> None:
        found.append(written())
        answer(self)

    model_ranks._ModelRank._next = counted
    train_from_stream(text, options, config, out)
    return found


def bytes_sent(config: Any, n_steps: int = 4) -> float:
    """Bytes that this rank hands to its sockets per step of the run that a `PlanConfig` describes."""
    from steersman.parallel import rank_and_world_size

    rank, n = rank_and_world_size()
    mesh = Mesh.over(n, rank=rank, d_sae=config.d_sae, batch_size=config.batch, latent=config.latent_shards)
    settings = TrainConfig(
        d_sae=config.d_sae, k=config.k, architecture=config.architecture, batch_size=config.batch, device="cpu",
        k_aux=config.k_aux, tokens=config.batch * 1000, aux_coefficient=0.25, dead_after=config.batch * 900,
        fused_update=config.fused or None,
    )  # fmt: skip
    rows = mixture(config.batch, d_in=config.d_in, atoms=200)
    share = config.batch // n
    with Ranks(mesh, 60) as ranks:
        trainer = trainer_of(settings, rows, ranks)
        mine = rows[rank * share : (rank + 1) * share]

        def step() -> None:
            if config.dead:  # so many of them, the same in every step
                silent_steps = torch.zeros_like(trainer.dead_latents.silent_steps)
                silent_steps[: config.dead // mesh.latent] = trainer.recipe.dead_after_steps
                trainer.dead_latents.restore(silent_steps)
            trainer.step(ranks.latent.all_gather(mine).flatten(0, 1))

        step()
        ranks.world.barrier()
        before = written()
        for _ in range(n_steps):
            step()
        return (written() - before) / n_steps
