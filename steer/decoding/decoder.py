"""One particle decoder: proposal x potential x resampler x what is returned.

N particles of each prompt write one token a step. A particle's weight is such that the weighted set approximates

    target(text) = p(text) exp(A(text)) 1[mask kept] / Z,

with p the model (or the proposal's base) and A the sum of the potentials, whatever drew the tokens. The systems that
differ only in its parts: SMC steering (arXiv 2306.03081: masks, `without_replacement` or `multinomial`), Feynman-Kac
steering (2501.06848: `Reward`, every 20 tokens, the argmax), CriticControl (2212.10938: one particle, a critic),
DARWIN (2406.15193: `truncation`), best-of-n (`never`).

Shape letters: P prompts, N particles of each, R = P N rows, M candidates (N, or N times the resampler's copies), V
vocabulary, J potentials.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.steer.decoding.population import Candidates, Cost, ParticleSet, Population, Writer
from steersman.steer.decoding.potentials import Potential
from steersman.steer.decoding.proposals import Proposal, draw
from steersman.steer.decoding.resampling import Resampler, as_resampler
from steersman.steer.decoding.sources import Source


def decode(
    source: Source,
    writer: Writer,
    n: int,
    *,
    max_new_tokens: int,
    proposal: Proposal | None = None,
    potentials: Sequence[Potential] = (),
    resampler: str | Resampler = "multinomial",
    every: int = 1,
    stop_ids: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
    guide: Source | None = None,
) -> list[ParticleSet]:
    """Particles over any `Source` of next-token log-probabilities, which has `n` rows for each prompt of `writer`, side
    by side: one `ParticleSet` per prompt.

    `guide` is a second source, kept in step, whose distribution proposes tokens in place of the first one's: the
    weight takes up the ratio. Raises SteersmanError when every particle of a prompt is dead, naming the step and what
    killed the last.
    """
    run = _Run(source, writer, n, max_new_tokens, proposal or Proposal(), potentials, as_resampler(resampler))
    run.every, run.stop_ids, run.guide = every, list(stop_ids), guide
    check_guide(run.proposal, guide)
    run.generators = [torch.Generator().manual_seed(int(s)) for s in seeds or range(run.P)]
    if len(run.generators) != run.P:
        raise SteersmanError(f"{len(run.generators)} seeds for {run.P} prompts: give one number, or one per prompt")
    for potential in potentials:
        potential.start()
    for step in range(max_new_tokens):
        if run.step(step):
            break
    return run.sets()


def check_guide(proposal: Proposal, guide: Any) -> None:
    """Raise SteersmanError where a guide is given and the target is not the model's own distribution."""
    if guide is not None and not proposal.corrected:
        raise SteersmanError("a guide proposes tokens for the model as target: corrected=False has no meaning with it")


class _Run:
    """The state of one decoding."""

    every: int
    stop_ids: list[int]
    guide: Source | None
    generators: list[torch.Generator]

    def __init__(
        self,
        source: Source,
        writer: Writer,
        n: int,
        T: int,
        proposal: Proposal,
        potentials: Sequence[Potential],
        resampler: Resampler,
    ) -> None:
        self.source, self.writer, self.n, self.T = source, writer, n, T
        self.proposal, self.potentials, self.resampler = proposal, list(potentials), resampler
        self.P = len(writer.prompt_ids)
        bounds = torch.tensor([p.numbers for p in self.potentials], dtype=torch.long).cumsum(0).tolist()
        self.numbers = [slice(end - p.numbers, end) for end, p in zip(bounds, self.potentials)]
        self.now = Population.started(self.P, n, T, len(self.potentials), bounds[-1] if bounds else 0)
        self.ancestors: list[Tensor] = []
        self.observing = any(potential.hook is not None for potential in self.potentials)

    def step(self, t: int) -> bool:
        """Write one token; True when nothing is left to write."""
        last = t == self.T - 1
        due = last or (t + 1) % self.every == 0
        copies = self.resampler.copies if due else 1
        new, parents = self._candidates(t, copies)
        self._check_alive(new, t, self._mask_name())
        ended = bool((new.finished | (new.log_shares == -torch.inf)).all())
        if due or ended:
            self._weigh(new, t)
        if copies > 1 or (due and not last and not ended):
            new, parents = self._resampled(new, parents)
        self.now = new
        self.ancestors.append(parents)
        if self.observing or not (last or ended):
            self._advance(parents)
        if self.observing:
            self._observe(t)
        return ended

    # Drawing

    def _candidates(self, t: int, copies: int) -> tuple[Population, Tensor]:
        """(candidates [P, M], the particle [P, M] that each continues)."""
        now, going = self.now, self.now.going()
        prefixes = now.prefixes()
        open_ = going.flatten().tolist()
        log_p = self.source.log_probs()
        guide = None if self.guide is None else self.guide.log_probs()
        drawable = self.proposal.distributions(log_p, guide, prefixes, open_, self.T - t)
        q, twist = drawable.q, None
        if self.proposal.critic is not None:
            q, twist = self.proposal.twisted(q, prefixes, getattr(self.source, "peek", None))
        parents, times, ordinal = _continuations(now, copies)
        u = torch.zeros(self.P, self.n, int(ordinal.max()) + 1, dtype=torch.float64)
        each = torch.arange(self.P)[:, None]
        u[each, parents, ordinal] = torch.stack(
            [torch.rand(parents.shape[1], dtype=torch.float64, generator=g) for g in self.generators]
        )
        tokens = draw(q, u.flatten(0, 1).to(q.device))
        rows, columns = (each * self.n + parents).to(q.device), ordinal.to(q.device)
        drawn = tokens[rows, columns]

        def of_drawn(table: Tensor) -> Tensor:
            return table[rows, drawn].double().cpu()

        new = now.taken(parents)
        writes = going[each, parents] & (times > 0)
        # A row without a token has log q = -inf: its particle dies.
        log_q = of_drawn(q)
        gained = torch.where(log_q == -torch.inf, -torch.inf, of_drawn(drawable.base) - log_q)
        kept = torch.where(times > 0, new.log_shares, -torch.inf)
        new.log_shares = torch.where(writes, new.log_shares + gained - times.double().log(), kept)
        new.log_prior = torch.where(writes, new.log_prior + of_drawn(log_p), new.log_prior)
        new.tokens[:, :, t] = drawn.cpu()
        new.length = new.length + writes.long()
        if twist is not None:
            self._apply(new, writes, len(self.potentials), of_drawn(twist))
        self._finish(new, writes, t)
        return new, parents

    def _finish(self, new: Population, going: Tensor, t: int) -> None:
        """Which of the particles that just wrote are finished, and which of them may not be."""
        token = new.tokens[:, :, t]
        stopped = going & torch.isin(token, torch.tensor(self.stop_ids, dtype=torch.long))
        finished, mask = stopped, self.proposal.mask
        if mask is not None:
            prefixes, rows = new.prefixes(), going.flatten().nonzero()[:, 0].tolist()
            closed = torch.zeros(going.numel(), dtype=torch.bool)
            closed[rows] = torch.tensor([mask.closed(prefixes[i]) for i in rows], dtype=torch.bool)
            finished = finished | closed.view_as(going)
            if t == self.T - 1:
                broken = torch.zeros(going.numel(), dtype=torch.bool)
                broken[rows] = torch.tensor([not mask.complete(prefixes[i]) for i in rows], dtype=torch.bool)
                new.log_shares = new.log_shares.masked_fill(broken.view_as(going) & ~finished, -torch.inf)
        new.finished = new.finished | finished
        if self.proposal.critic is not None:
            over = new.finished | (t == self.T - 1)  # the twist is taken back at a text's end
            self._apply(new, going & over, len(self.potentials), torch.zeros_like(new.log_shares))

    # Weighing

    def _apply(self, new: Population, where: Tensor, j: int, value: Tensor) -> None:
        """Put log potential number j of the particles in `where` [P, M] into their shares, in place of what it was."""
        where = where & (new.log_shares > -torch.inf)
        new.log_shares = torch.where(where, new.log_shares + value - new.applied[..., j], new.log_shares)
        new.applied[..., j] = torch.where(where, value, new.applied[..., j])

    def _weigh(self, new: Population, t: int) -> None:
        final = new.finished | (t == self.T - 1)
        P, M = new.log_shares.shape
        for j, potential in enumerate(self.potentials):
            if potential.hook is not None:
                continue
            asked = ~new.settled & (new.log_shares > -torch.inf)
            rows = asked.flatten().nonzero()[:, 0]
            if not len(rows):
                break
            prefixes = new.prefixes()
            candidates = Candidates(
                self.writer,
                [i // M for i in rows.tolist()],
                [prefixes[i] for i in rows.tolist()],
                final.flatten()[rows],
            )
            memory = new.memory[..., self.numbers[j]].flatten(0, 1)
            value, memory[rows] = potential.value(candidates, memory[rows])
            new.memory[..., self.numbers[j]] = memory.view(P, M, -1)
            table = torch.zeros(P * M, dtype=torch.float64)
            table[rows] = value.double().cpu()
            self._apply(new, asked, j, table.view(P, M))
            self._check_alive(new, t, potential.what)
        new.settled = new.settled | new.finished

    def _observe(self, t: int) -> None:
        """Potentials that read states, after the pass over the tokens that were just written."""
        now = self.now
        # An end token is not read; a text that ends otherwise is read to its last token.
        token = now.tokens[:, :, t]
        wrote = (now.length == t + 1) & ~torch.isin(token, torch.tensor(self.stop_ids, dtype=torch.long))
        states: dict[str, Tensor] = getattr(self.source, "states", {})
        for j, potential in enumerate(self.potentials):
            if potential.hook is None:
                continue
            memory = now.memory[..., self.numbers[j]]
            value, after = potential.observe(states[potential.hook], memory.flatten(0, 1))
            now.memory[..., self.numbers[j]] = torch.where(wrote[..., None], after.view_as(memory), memory)
            self._apply(now, wrote, j, value.double().cpu().view_as(now.log_shares))
            self._check_alive(now, t, potential.what)

    # Resampling

    def _resampled(self, new: Population, parents: Tensor) -> tuple[Population, Tensor]:
        M = new.log_shares.shape[1]
        if self.n < M:
            self._merge(new)
        index = torch.arange(self.n).expand(self.P, -1).clone()
        shares = torch.empty(self.P, self.n, dtype=torch.float64)
        for p, candidate in enumerate(new.log_shares):
            if self.n == M and not self.resampler.due(candidate):
                shares[p] = candidate
                continue
            chosen = self.resampler.choose(candidate, self.n, self.generators[p])
            index[p], shares[p] = chosen.index, chosen.log_shares
        new = new.taken(index)
        new.log_shares = shares
        return new, parents.gather(1, index)

    def _merge(self, new: Population) -> None:
        """Give the whole share of equal texts to the first of them: the weighted set says the same with fewer."""
        prefixes, M = new.prefixes(), new.log_shares.shape[1]
        for p, shares in enumerate(new.log_shares):
            first: dict[tuple[int, ...], int] = {}
            for m in (shares > -torch.inf).nonzero()[:, 0].tolist():
                kept = first.setdefault(prefixes[p * M + m], m)
                if kept != m:
                    shares[kept] = torch.logaddexp(shares[kept], shares[m])
                    shares[m] = -torch.inf

    def _advance(self, parents: Tensor) -> None:
        rows = (parents + self.n * torch.arange(self.P)[:, None]).flatten()
        # Every particle's newest token; what a finished one is fed is never looked at.
        tokens = self.now.tokens[:, :, len(self.ancestors) - 1].flatten()
        self.source.advance(rows, tokens)
        if self.guide is not None:
            self.guide.advance(rows, tokens)

    # Ends

    def _mask_name(self) -> str:
        return "the proposal" if self.proposal.mask is None else self.proposal.mask.what

    def _check_alive(self, new: Population, t: int, what: str) -> None:
        if bool(torch.isnan(new.log_shares).any()):
            raise SteersmanError(f"a weight became NaN at token {t + 1}, by {what}")
        dead = (new.log_shares == -torch.inf).all(1)
        if bool(dead.any()):
            p = int(dead.long().argmax())
            which = f" of prompt {p}" if self.P > 1 else ""
            raise SteersmanError(
                f"all {self.n} particles{which} are dead at token {t + 1}: {what} leaves none of them; take more "
                "particles or tokens, or loosen it"
            )

    def sets(self) -> list[ParticleSet]:
        now, n = self.now, self.n
        sources = [self.source] if self.guide is None else [self.source, self.guide]
        cost = Cost(forward_passes=sum(s.passes for s in sources), rows=sum(s.rows for s in sources), reward_calls=0)
        for potential in self.potentials:
            cost = cost + potential.cost
        prefixes, written = now.prefixes(), self.writer.decode is not None
        logs = now.log_shares + torch.tensor(n, dtype=torch.float64).log()
        out = []
        for p in range(self.P):
            mine = prefixes[p * n : (p + 1) * n]
            proper = self.resampler.proper and self.proposal.temperature > 0
            out.append(
                ParticleSet(
                    prompt=self.writer.text(p, ()) if written else "",
                    completions=[self.writer.completion(p, prefix) for prefix in mine] if written else [],
                    texts=[self.writer.text(p, prefix) for prefix in mine] if written else [],
                    tokens=mine,
                    log_weights=logs[p],
                    log_prior=now.log_prior[p],
                    log_potential=now.applied[p].sum(1),
                    log_z=float(now.log_shares[p].logsumexp(0)) if proper else None,
                    ended=now.finished[p],
                    ancestors=torch.stack([step[p] for step in self.ancestors]),
                    cost=cost,
                )
            )
        return out


def _continuations(now: Population, copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """(parents, times, ordinal), each [P, M]: which particle a candidate continues, how many candidates continue that
    one (0: the candidate is none), and the how many-th of them it is.

    With `copies` above 1 the M = N copies places go to the living particles evenly; a finished one takes one.
    """
    P, n = now.log_shares.shape
    if copies == 1:
        ones = torch.ones(P, n, dtype=torch.long)
        return torch.arange(n).expand(P, -1).clone(), ones, ones - 1
    parents = torch.zeros(P, n * copies, dtype=torch.long)
    times, ordinal = parents.clone(), parents.clone()
    for p, going in enumerate(now.going()):
        done = (now.finished[p] & (now.log_shares[p] > -torch.inf)).nonzero()[:, 0]
        alive = going.nonzero()[:, 0]
        places = n * copies - len(done)
        order = torch.arange(places)
        parents[p, : len(done)], times[p, : len(done)] = done, 1
        if len(alive):
            i = order % len(alive)
            parents[p, len(done) :] = alive[i]
            ordinal[p, len(done) :] = order // len(alive)
            times[p, len(done) :] = torch.bincount(i)[i]
    return parents, times, ordinal
