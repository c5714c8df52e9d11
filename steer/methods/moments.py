"""Sums over samples that never keep the samples. D width, N samples."""

import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from steersman.errors import SteersmanError


class RunningMean:
    """Mean of samples [N, D], summed in float64; each counts once, or with a weight."""

    def __init__(self, n: int = 0, total: Tensor | None = None, mass: float = 0.0) -> None:
        self.n, self.total, self.mass = n, total, mass

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Take in samples [n, D] with weights [n]; none is fine."""
        if len(x):
            part = x.double().sum(0) if weight is None else weight.double() @ x.double()
            self.n, self.total = self.n + len(x), part if self.total is None else self.total + part
            self.mass += len(x) if weight is None else float(weight.sum())

    def merged(self, other: "RunningMean") -> "RunningMean":
        """The mean over both sets of samples."""
        if self.total is None or other.total is None:
            known = self if other.total is None else other
            return RunningMean(known.n, known.total, known.mass)
        return RunningMean(self.n + other.n, self.total + other.total, self.mass + other.mass)

    @property
    def mean(self) -> Tensor:
        """[D] float64. Raises SteersmanError when there was no sample."""
        if self.total is None:
            raise SteersmanError("there are no examples on one side to take a mean of")
        if not self.mass:
            raise SteersmanError("the weights of one side add up to 0: no mean can be taken with them")
        return self.total / self.mass


class SecondMoment:
    """Sum of x x^T over samples, about zero: [D, D] float64."""

    def __init__(self, total: Tensor | None = None) -> None:
        self.total = total

    def add(self, x: Tensor) -> None:
        """Take in samples [n, D]."""
        if len(x):
            wide = x.double()
            part = wide.T @ wide
            self.total = part if self.total is None else self.total.add_(part)

    def merged(self, other: "SecondMoment") -> "SecondMoment":
        """The sum over both sets of samples."""
        if self.total is None or other.total is None:
            return SecondMoment(self.total if other.total is None else other.total)
        return SecondMoment(self.total + other.total)

    def first_component(self) -> tuple[Tensor, float]:
        """The unit eigenvector [D] float64 of the largest eigenvalue, and that eigenvalue's fraction of the trace."""
        if self.total is None or not float(self.total.trace()) > 0:
            raise SteersmanError("the examples of each pair give the same states: there is no difference to analyse")
        values, vectors = torch.linalg.eigh(self.total)
        return vectors[:, -1], float(values[-1] / values.sum())


class RunningCovariance:
    """Mean and covariance of samples [N, D], in float64.

    Each batch is centred on its own mean and joined to what is known (Chan, Golub and LeVeque 1979, equation 2.1), so
    that a mean far from zero costs no digits.
    """

    def __init__(self, n: int = 0, mean: Tensor | None = None, scatter: Tensor | None = None) -> None:
        self.n, self._mean, self._scatter = n, mean, scatter

    def add(self, x: Tensor) -> None:
        """Take in samples [n, D]; none is fine."""
        if len(x):
            wide = x.double()
            mean = wide.mean(0)
            centred = wide - mean
            joined = self.merged(RunningCovariance(len(x), mean, centred.T @ centred))
            self.n, self._mean, self._scatter = joined.n, joined._mean, joined._scatter

    def merged(self, other: "RunningCovariance") -> "RunningCovariance":
        """Mean and covariance over both sets of samples."""
        if self._mean is None or self._scatter is None or other._mean is None or other._scatter is None:
            known = self if other._mean is None else other
            return RunningCovariance(known.n, known._mean, known._scatter)
        n, apart = self.n + other.n, other._mean - self._mean
        scatter = self._scatter + other._scatter
        scatter += (self.n * other.n / n) * torch.outer(apart, apart)
        return RunningCovariance(n, self._mean + apart * (other.n / n), scatter)

    @property
    def mean(self) -> Tensor:
        """[D] float64. Raises SteersmanError when there was no sample."""
        if self._mean is None:
            raise SteersmanError("there are no examples on one side to take a mean of")
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """[D, D] float64, the scatter over N. Raises SteersmanError when there was no sample."""
        if self._scatter is None:
            raise SteersmanError("there are no examples on one side to take a covariance of")
        return self._scatter / self.n


class SampleFile:
    """Samples with labels in a temporary file, for methods that go over them many times."""

    def __init__(self) -> None:
        self._files = [tempfile.TemporaryFile(prefix="steersman-")]  # noqa: SIM115 (gone when this object is)
        self._labels: list[list[Tensor]] = [[]]
        self.width = 0

    def add(self, x: Tensor, label: Tensor) -> None:
        """Take in samples [n, D] and their labels [n]."""
        self.width = x.shape[1]
        self._labels[0].append(label)
        try:
            self._files[0].write(np.ascontiguousarray(x.float().numpy()).tobytes())
        except OSError as error:
            raise SteersmanError(f"no room in {tempfile.gettempdir()} for the states: {error.strerror}") from error

    def merged(self, other: "SampleFile") -> "SampleFile":
        """Both sets of samples; the files are shared, not copied."""
        both = SampleFile.__new__(SampleFile)
        both._files, both._labels = self._files + other._files, self._labels + other._labels
        both.width = self.width or other.width
        return both

    def chunks(self, rows: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
        """Samples [n, D] fp32 and labels [n], `rows` at a time."""
        for file, parts in zip(self._files, self._labels):
            if not parts:
                continue
            labels = torch.cat(parts)
            file.seek(0)
            for start in range(0, len(labels), rows):
                part = labels[start : start + rows]
                data = bytearray(file.read(len(part) * self.width * 4))
                yield torch.frombuffer(data, dtype=torch.float32).reshape(len(part), self.width), part
            file.seek(0, 2)
