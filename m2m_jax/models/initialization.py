"""How M2M starts from a pretrained single-image U-Net."""

from m2m_jax.errors import UserError
from m2m_jax.models.parameters import Params


def is_set_attention(name: str) -> bool:
    """Parameters that Image-Set Attention adds to a transformer block: attn2 and the norm before it."""
    return ".attn2." in name or (".norm2." in name and ".transformer_blocks." in name)


def from_pretrained(params: Params, pretrained: Params, folder: str) -> Params:
    """Takes over every parameter of a single-image U-Net and starts the set attention beside it.

    The queries, keys, values and norm of attn2 start as copies of attn1's in the same block, which already match like
    with like, and its output projection starts at zero: at step 0 the network is the pretrained one, whatever the
    context, and the context fades in. Not the paper's choice, which is not known.

    Raises:
      UserError: anything else is missing, left over, or of another shape.
    """
    new = {name for name in params if is_set_attention(name)}
    problems = [f"missing {name}" for name in params.keys() - pretrained.keys() - new]
    problems += [f"unexpected {name}" for name in pretrained.keys() - params.keys()]
    shared = params.keys() & pretrained.keys()
    problems += [
        f"{name} is {pretrained[name].shape} there and {params[name].shape} here"
        for name in shared
        if pretrained[name].shape != params[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(
            f"init.path={folder} does not fit config.model: {'; '.join(sorted(problems)[:8])}{more}; "
            "set config.model to that folder's config.json, or init.path= to train from scratch"
        )
    started = {name: pretrained[name] for name in shared}
    for name in new - shared:
        if ".attn2.to_out." in name:
            started[name] = params[name] * 0
        else:
            started[name] = started[name.replace(".attn2.", ".attn1.").replace(".norm2.", ".norm1.")]
    return started
