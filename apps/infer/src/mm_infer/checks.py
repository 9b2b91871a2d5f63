"""What goes into the sampling loop and what comes out of it, and why it may not be fit."""

from torch import Tensor, nn

from mm_infer.config import Options
from mm_infer.encode import Encoders
from mm_models.diffusion.sampling import noise
from mm_models.encoders import VideoVAE


def first_latents(given: Tensor | None, options: Options, vae: VideoVAE, references: int) -> Tensor:
    """Noise, 1 C F H W with a frame in front for each reference: drawn from the seed, or what was given.

    Raises ValueError if that has another shape.
    """
    channels, frames, *size = vae.latent_shape(options.frames, options.height, options.width)
    shape = (channels, references + frames, *size)
    if given is None:
        return noise(options.seed, shape)[None]
    if tuple(given.shape) != (1, *shape):
        more = f" and {references} references" if references else ""
        raise ValueError(
            f"latents have shape {tuple(given.shape)}, but {options.frames} frames of "
            f"{options.height}x{options.width}{more} need {(1, *shape)}"
        )
    return given


def blame(made_from: dict[str, Tensor], model: nn.Module, encoders: Encoders) -> str:
    """The likely cause of latents that are not finite; made_from: text and conditions."""
    for name, tensor in made_from.items():
        if not tensor.isfinite().all():
            maker = {"text": "the text encoder", "image": "CLIP"}.get(name, "the VAE")
            return f"{maker}'s output is not finite already: look at the weights in {encoders.path}"
    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if broken:
        return f"{len(broken)} tensors of the weights hold such values, first {broken[0]}: take other weights"
    return f"the weights are finite, but the model overflows in {encoders.dtype} with this prompt and these options"
