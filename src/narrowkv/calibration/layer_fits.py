"""The statistics that recipes need of one layer, and the quantizers that are fitted to them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from narrowkv.calibration.allocation import Option, measure
from narrowkv.calibration.distributed import Group
from narrowkv.calibration.fit import Fit
from narrowkv.calibration.influence import Influence, limited, squared_norms
from narrowkv.calibration.rates import RateOption, counted_tokens
from narrowkv.calibration.samples import SampleFit
from narrowkv.calibration.trellis_fit import TrellisFit
from narrowkv.codec import AnyQuantizer, Quantization, Scheme, Transform
from narrowkv.codec.frames import Frames
from narrowkv.errors import CalibrationError
from narrowkv.methods import Recipe
from narrowkv.store.bias import Bias, subtract_constant

AnyFit = Fit | SampleFit
NO_GRADIENT = (
    "No gradient of the loss comes back through this model's layers, as through those that torch.ao quantizes dynamically; "
    "calibrate the model before it is quantized, or choose a recipe that learns nothing, such as int4."
)
Stream = tuple[bool, bool, int]  # keys or values, before the rotary embedding, first tokens left out


@dataclass(frozen=True)
class FitKey:
    """One tensor to be learned from. Bits and Q-Norm only matter when a codebook is read off, and rates when they are
    allocated, so recipes that differ in nothing else share their fits.

    sampled: for a sample of the tensor alone.
    """

    scheme: Scheme
    keys: bool
    sinks: int
    sampled: bool = False

    @classmethod
    def of(cls, scheme: Scheme, keys: bool, sinks: int) -> "FitKey":
        if scheme.datatype == "trellis":
            return cls(
                Scheme(Quantization(4, "trellis", strategy="channel"), Transform(pre_rope=scheme.transform.pre_rope)),
                keys,
                sinks,
            )
        return cls(scheme.with_settings(bits=4, qnorm=False) if scheme.datatype == "nuq" else scheme, keys, sinks)

    @classmethod
    def sample(cls, scheme: Scheme, keys: bool, sinks: int) -> "FitKey":
        """A sample of the tensor that a scheme quantizes."""
        return cls(
            Scheme(Quantization(4, "nuq", strategy="channel"), Transform(pre_rope=scheme.transform.pre_rope)),
            keys,
            sinks,
            sampled=True,
        )


class LayerFits:
    """All that is learned from one layer for some recipes. shape: kv_heads, head_dim.

    biases: what caches take out of keys stored before the rotary embedding, and of those stored after it, with values.
    sliding_window: the most tokens that the layer stores. frames: in which keys of streams may be rotated.
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        layer: int,
        shape: tuple[int, int],
        biases: tuple[Bias, Bias] | None = None,
        sliding_window: int | None = None,
        frames: Frames | None = None,
    ):
        self.shape = shape
        self.counted_tokens = counted_tokens(sliding_window)
        self.biases = biases or (Bias(), Bias())
        fit_keys: set[FitKey] = set()
        for recipe in recipes:
            pair = recipe.schemes(layer)
            for scheme, keys in ((pair.keys, True), (pair.values, False)):
                schemes = [scheme]
                if recipe.search_space:
                    schemes = list(recipe.search_space.keys if keys else recipe.search_space.values)
                    sampled = [scheme for scheme in schemes if scheme.datatype != "trellis"]
                    fit_keys |= {FitKey.sample(scheme, keys, recipe.sinks) for scheme in sampled}
                fit_keys |= {FitKey.of(scheme, keys, recipe.sinks) for scheme in schemes}
        self.influences = {_stream(fit_key): Influence() for fit_key in sorted(fit_keys, key=str)}
        frames = frames or Frames.of(shape[1])
        self.fits: dict[FitKey, AnyFit] = {fit_key: _fit_for(fit_key, frames) for fit_key in sorted(fit_keys, key=str)}

    @property
    def elements(self) -> int:
        """Of a token's keys, or values."""
        return self.shape[0] * self.shape[1]

    @property
    def needs_drawn(self) -> bool:
        """Whether gradients of the loss on tokens drawn from the model are learned from too."""
        return any(isinstance(fit, TrellisFit) for fit in self.fits.values())

    def observe_range(self, keys: Tensor, rotated: Tensor, values: Tensor, rope_state: Tensor | None = None) -> None:
        """First pass: keys before and after the rotary embedding, and values, [batch, kv_heads, tokens, head_dim] each.

        rope_state: by which the rotary embedding has rotated them, [1 or batch, tokens, ...].
        """
        for fit_key, fit in self.fits.items():
            elements = self._without_bias(fit_key, _wanted(fit_key, keys, rotated, values).detach(), rope_state)
            fit.observe_range(_tokens(elements, fit_key.sinks))

    def observe_codebook(self, keys: Tensor, rotated: Tensor, values: Tensor, rope_state: Tensor | None = None) -> None:
        """Second pass: the same with gradients, which the fits see once they are known: first those of the loss on the text,
        then, where they come, those of the loss on tokens drawn from the model.
        """
        for elements in (keys, rotated, values):
            learning = {
                fit_key: fit
                for fit_key, fit in self.fits.items()
                if fit.needs_codebook and _wanted(fit_key, keys, rotated, values) is elements
            }
            if learning:
                with_gradient(
                    elements, self._observe_gradient(learning, elements.detach(), rope_state), self._observe_drawn(learning)
                )

    def _observe_gradient(
        self, learning: dict[FitKey, AnyFit], elements: Tensor, rope_state: Tensor | None
    ) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            known = {fit_key: self._without_bias(fit_key, elements, rope_state) for fit_key in learning}
            for i, slope in enumerate(gradient.split(1)):  # a sequence at a time
                slopes = {
                    stream: self.influences[stream].limit(_tokens(slope, stream[-1]))
                    for stream in dict.fromkeys(map(_stream, learning))
                }
                for fit_key, fit in learning.items():
                    fit.observe_codebook(_tokens(known[fit_key][i : i + 1], fit_key.sinks), slopes[_stream(fit_key)])

        return see

    def _observe_drawn(self, learning: dict[FitKey, AnyFit]) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            for slope in gradient.split(1):  # a sequence at a time
                for fit_key, fit in learning.items():
                    if isinstance(fit, TrellisFit):
                        drawn = _tokens(slope, fit_key.sinks)
                        fit.observe_drawn(limited(drawn, squared_norms(drawn)))

        return see

    def _without_bias(self, fit_key: FitKey, elements: Tensor, rope_state: Tensor | None) -> Tensor:
        """Elements as a cache would encode them."""
        bias = self.biases[0 if fit_key.scheme.transform.pre_rope else 1]
        known = bias.keys if fit_key.keys else bias.values
        if known is None or not fit_key.scheme.takes_bias_out:
            return elements
        if fit_key.keys and bias.rope is not None and rope_state is not None:
            return subtract_constant(elements, bias.rotated(rope_state), fit_key.scheme)
        return subtract_constant(elements, known[None, :, None], fit_key.scheme)

    def require_gradients(self) -> None:
        """After the second pass: raise CalibrationError where the gradient of something that learns never came."""
        learning = {_stream(fit_key) for fit_key, fit in self.fits.items() if fit.needs_codebook}
        if any(not self.influences[stream].count.sum() for stream in learning):
            raise CalibrationError(NO_GRADIENT)

    def merge_ranges(self, group: Group) -> None:
        for fit in self.fits.values():  # in the same order in every process
            fit.merge_ranges(group)

    def merge_codebooks(self, group: Group) -> None:
        for fit in self.fits.values():
            fit.merge_codebook(group)
        for influence in self.influences.values():
            influence.merge(group)

    def dominated(self) -> dict[str, float]:
        """The largest share of the Fisher information in a hundredth of the tokens, for `keys` and for `values`."""
        found = {True: 0.0, False: 0.0}
        for (keys, *_), influence in self.influences.items():
            found[keys] = max(found[keys], influence.share_of_few())
        return {"keys": found[True], "values": found[False]}

    def quantizer(self, scheme: Scheme, keys: bool, sinks: int) -> AnyQuantizer:
        """The finished quantizer of the keys or of the values."""
        fit = self.fits[FitKey.of(scheme, keys, sinks)]
        assert isinstance(fit, Fit | TrellisFit)
        return fit.quantizer(self.shape, scheme)

    def menu(self, schemes: Iterable[Scheme], keys: bool, sinks: int, tokens: float) -> list[Option]:
        """What each of these schemes would take and cost; tokens: over which tables are counted."""
        menu = []
        for scheme in schemes:
            sampled = self.fits[FitKey.sample(scheme, keys, sinks)]
            assert isinstance(sampled, SampleFit)
            menu.append(measure(self.quantizer(scheme, keys, sinks), sampled.samples, keys, tokens))
        return menu

    def rate_menu(self, schemes: Iterable[Scheme], keys: bool, sinks: int, tokens: float) -> list[RateOption]:
        """What the units of each of these schemes cost, of which rates are to be allocated; tokens: as above."""
        menu = []
        for scheme in schemes:
            fit = self.fits[FitKey.of(scheme, keys, sinks)]
            assert isinstance(fit, TrellisFit)
            menu.append(
                RateOption(
                    scheme,
                    self.shape[0],
                    fit.transform(scheme.transform.learned_rotation).unit_costs(),
                    tokens,
                    self.counted_tokens,
                )
            )
        return menu

    def measured(self, scheme: Scheme, keys: bool, sinks: int, tokens: float) -> Option:
        """What one of the schemes whose rates were allocated takes and costs; tokens: as above."""
        fit = self.fits[FitKey.of(scheme, keys, sinks)]
        assert isinstance(fit, TrellisFit)
        return measure(self.quantizer(scheme, keys, sinks), fit.samples, keys, tokens)


def _fit_for(fit_key: FitKey, frames: Frames) -> AnyFit:
    if fit_key.sampled:
        return SampleFit()
    if fit_key.scheme.datatype == "trellis":
        return TrellisFit(frames if fit_key.scheme.transform.pre_rope else None)
    return Fit(fit_key.scheme)


def _wanted(fit_key: FitKey, keys: Tensor, rotated: Tensor, values: Tensor) -> Tensor:
    if not fit_key.keys:
        return values
    return keys if fit_key.scheme.transform.pre_rope else rotated


def _tokens(x: Tensor, skip: int) -> Tensor:
    """[batch, kv_heads, tokens, head_dim] -> [samples, kv_heads, head_dim], the first `skip` tokens of each row left out."""
    return x.detach()[:, :, skip:].transpose(1, 2).flatten(0, 1)


def with_gradient(elements: Tensor, *see: Callable[[Tensor], None]) -> None:
    """Call functions with the gradient of `elements` once it is known, one at each way back.

    Raises CalibrationError then, where there is none.
    """
    following = iter(see)

    def hook(gradient: Tensor | None) -> None:
        if gradient is None:
            raise CalibrationError(NO_GRADIENT)
        next(following)(gradient)

    elements.register_hook(hook)


def _stream(fit_key: FitKey) -> Stream:
    """Needs of one stream see the same tokens of the same tensor."""
    return fit_key.keys, fit_key.keys and fit_key.scheme.transform.pre_rope, fit_key.sinks
