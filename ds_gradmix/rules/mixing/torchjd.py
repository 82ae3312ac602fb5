import importlib
import importlib.util
import inspect
import types
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import torch
from pydantic import Field, ValidationInfo, create_model, field_validator
from torch import Tensor
from typing_extensions import Self

from ds_gradmix.config_messages import nearest
from ds_gradmix.log import logger
from ds_gradmix.rules.base import GramianMixing, RngKey, WrongParam
from ds_gradmix.rules.decision import MixingDecision

_INSTALL = "pip install ds_gradmix[torchjd]"
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_MOST_TRIED = 256  # workers; some weightings take minutes for thousands
_STREAM = 2  # of random numbers, independent of those that other rules draw at the same key


class TorchJD(GramianMixing):
    """The weights of any Gramian weighting of the package TorchJD, which has a dozen: UPGrad, MGDA, CAGrad.

    Quinton, Rey 2024, arXiv 2406.16232, and the papers that the package's documentation names. `weighting`
    is the name of a class of `torchjd.aggregation` that makes weights from a Gram matrix; its constructor's
    parameters are further params, vectors as lists. It is imported where this rule is used, never else.
    Weights are as it gives them, so they may not sum to 1. Ours: the Gram matrix is divided by the mean of
    its diagonal, so that the scale of gradients has no effect; a worker that is left out has weight 0, and
    what is a list of a number for every worker is given without its number; one worker alone has weight 1.
    What weightings draw at random is keyed by seed and step. Where one fails, the workers have equal
    weights, and a warning says so. Weightings with a state are refused: it would not be in checkpoints.

    Gram matrices are copied to the host, which waits for them, and are taken one after another in float64.
    """

    depends_on_order: ClassVar[bool] = True  # a preference, a random order

    weighting: str = Field(description="a class of torchjd.aggregation, such as `UPGradWeighting`")

    @field_validator("*", mode="after")
    @classmethod
    def _constructor_takes_it(cls, value: object, info: ValidationInfo) -> object:
        params = {**info.data, str(info.field_name): value}
        if (name := params.pop("weighting", None)) is None:  # it has a message of its own
            return value
        kind = _weighting_class(name)
        parameters = inspect.signature(kind).parameters.values()
        if all(of.default is not of.empty or of.name in params for of in parameters):
            try:
                kind(**{name: _as_tensor(value) for name, value in params.items()})
            except (ImportError, TypeError, ValueError) as error:
                raise ValueError(str(error)) from error
        return value

    def __new__(cls, /, **params: Any) -> Self:
        """An instance of the class that has the weighting's own parameters as fields."""
        return super().__new__(cls.params_class(params) if cls is TorchJD else cls)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """None where TorchJD is not installed."""
        try:
            return (cls(weighting="UPGradWeighting"),)
        except WrongParam:
            return ()

    @classmethod
    def params_class(cls, params: Mapping[Any, object]) -> type[Self]:
        """A subclass with a field for each parameter of the weighting's constructor."""
        return _class_of(_weighting_class(params.get("weighting"))) if cls is TorchJD else cls

    def refused(self, num_workers: int) -> WrongParam | None:
        """What the weighting itself does not take."""
        if num_workers < 2:
            return None
        for name, value in self._params().items():
            if isinstance(value, list) and len(value) != num_workers:
                allowed = f"a list of {num_workers} numbers, one for each worker"
                return WrongParam(name, allowed, "change it, or remove it for the default")
        if num_workers > _MOST_TRIED:
            return None
        reason = _reason(self.weighting, self.model_dump_json(), num_workers)
        if reason is None:
            return None
        return WrongParam("weighting", f"one that takes {num_workers} workers", reason)

    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> MixingDecision:
        """Weights `[S, W]`, one segment after another."""
        gram, present = gram_SWW.detach().cpu(), present_W.cpu()
        weights_SW = torch.zeros_like(gram[:, 0])
        with torch.random.fork_rng(devices=[]):
            for weights_W, gram_WW in zip(weights_SW, gram, strict=True):
                # Segments are decided independently, and anew after a resume.
                torch.manual_seed(int(key.generator(_STREAM).integers(2**62)))
                weights_W[present] = self._weights(gram_WW[present][:, present], present)
        return MixingDecision(weights_SW.to(gram_SWW.device), present_W.any().expand(len(weights_SW)))

    def _weights(self, gram_nn: Tensor, present_W: Tensor) -> Tensor:
        num = len(gram_nn)
        equal_n = gram_nn.new_full((num,), 1.0 / max(num, 1))
        mean = float(gram_nn.diagonal().mean()) if num else 0.0
        # What is not finite becomes NaN later, and of zero gradients all sums are the same.
        if num < 2 or not mean > 0 or not bool(gram_nn.isfinite().all()):
            return equal_n
        try:
            weights_n: Tensor = self._built(present_W)(gram_nn / mean).detach().to(gram_nn)
            if bool(weights_n.isfinite().all()):
                return weights_n
            _warn(f"{self.weighting} gave weights that are not finite")
        except Exception as error:
            _warn(f"{self.weighting} failed with {type(error).__name__}: {error}")
        return equal_n

    def _params(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields if name != "weighting"}

    def _built(self, present_W: Tensor) -> Any:
        """The weighting, anew every time, so that it keeps nothing."""
        params = {name: _as_tensor(value, present_W) for name, value in self._params().items()}
        return _weighting_class(self.weighting)(**params)


def _as_tensor(value: object, present_W: Tensor | None = None) -> object:
    """A parameter as the constructor wants it; a list that has a number for every worker is cut down."""
    if not isinstance(value, list):
        return value
    vector = torch.tensor(value, dtype=torch.float64)
    return vector if present_W is None or len(vector) != len(present_W) else vector[present_W]


@lru_cache(maxsize=64)
def _warn(text: str) -> None:
    logger.warning(f"ds_gradmix: TorchJD's {text}; workers have equal weights there. This is said once")


@lru_cache(maxsize=64)
def _reason(weighting: str, params: str, num_workers: int) -> str | None:
    """Why a weighting with these params, as JSON, takes no Gram matrix of so many workers, or None."""
    rule = _class_of(_weighting_class(weighting)).model_validate_json(params)
    try:
        with torch.random.fork_rng(devices=[]):
            built = rule._built(torch.ones(num_workers, dtype=torch.bool))
            built(torch.eye(num_workers, dtype=torch.float64))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _weightings() -> dict[str, type]:
    """All Gramian weightings that are public, by name.

    Raises:
        WrongParam: if TorchJD is not installed.
    """
    try:
        module: Any = importlib.import_module("torchjd.aggregation")
    except ImportError as error:
        advice = f"TorchJD is not there ({error}): {_INSTALL}"
        raise WrongParam("weighting", "a class of the package torchjd", advice) from error
    found = {name: getattr(module, name) for name in module.__all__}
    bases = {name: [base.__name__ for base in kind.__mro__] for name, kind in found.items()}
    return {name: found[name] for name, of in bases.items() if "_GramianWeighting" in of}


def _weighting_class(name: object) -> Any:
    """The class of a weighting without state.

    Raises:
        WrongParam: if it is none of them, or a package that it needs is not there.
    """
    every = _weightings()
    stateful = [of for of, kind in every.items() if hasattr(kind, "reset")]
    known = [of for of in every if of not in stateful]
    lower = name.lower() if isinstance(name, str) else None
    found = next((of for of in every if of.lower() == lower), None)
    allowed = " or ".join(f'"{of}"' for of in known)
    if found is None:
        raise WrongParam("weighting", allowed, nearest(name, known) or "name one of these")
    if found in stateful:
        advice = f"{found} keeps a state over steps, which checkpoints would not have: use another"
        raise WrongParam("weighting", allowed, advice)
    needed = getattr(every[found], "_REQUIRED_DEPS", [])
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        advice = f"{found} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        raise WrongParam("weighting", allowed, advice)
    return every[found]


@lru_cache(maxsize=64)
def _class_of(weighting: Any) -> Any:
    """TorchJD with fields for what the constructor of a weighting takes, so far as JSON has it."""
    hints: Any = get_type_hints(weighting.__init__)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(weighting).parameters.items():
        kind = _json_type(hints.get(name))
        default = ... if parameter.default is parameter.empty else parameter.default
        if kind is not None:
            fields[name] = (kind, Field(default, description=f"of {weighting.__name__}"))
        elif default is ...:
            advice = f"the parameter {name} of {weighting.__name__} cannot be written in JSON"
            raise WrongParam("weighting", "one whose parameters are numbers, lists and names", advice)
    module = TorchJD.__module__
    made: Any = create_model(
        "TorchJD", __base__=TorchJD, __module__=module, __doc__=TorchJD.__doc__, **fields
    )
    return made


def _json_type(hint: Any) -> Any:
    """The type of a field for a constructor's parameter, None if JSON has none."""
    plain = {float: _Finite, int: int, bool: bool, str: str, types.NoneType: types.NoneType}
    if hint is Tensor:
        return list[_Finite]
    if get_origin(hint) in (Union, types.UnionType):
        options = [option for option in map(_json_type, get_args(hint)) if option is not None]
        return Union[tuple(options)] if set(options) - {types.NoneType} else None  # noqa: UP007
    return hint if get_origin(hint) is Literal else plain.get(hint)
