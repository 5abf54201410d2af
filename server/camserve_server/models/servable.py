"""Requirements of methods on models."""

from __future__ import annotations

from camserve_server import registry
from camserve_server.models.attention import attention_kinds
from camserve_server.models.model import Model


def unsupported_reason(method: registry.Method, model: Model) -> str:
    """Return the reason why the model cannot serve the method with its default layers.

    Args:
        method: Registered method.
        model: Loaded model.

    Returns:
        The end of a sentence such as "m cannot serve cam: it …"; an empty string if the model can serve the method.
    """
    if method.layers != "none" and (reason := model.why_no_default_layers(method.layers == "many")):
        return reason
    # A method without layers differentiates the input. An ascent does, too, so it shows whether that is possible.
    kinds = ("gradient", "ascend") if method.passes == "gradient" and method.layers == "none" else (method.passes,)
    for kind in kinds:
        if kind in model.unavailable:
            return f"it has no {kind} passes: {model.unavailable[kind]}"
    has: dict[registry.Needs, bool] = {
        "": True,
        "gap": model.gap is not None,
        "attention": bool(model.attention),
        "ablation": not any(layer.read_only for layer in model.spatial.values()),
    }
    if has[method.needs]:
        return ""
    attention = attention_kinds(model.module) if method.needs == "attention" else []
    if attention:
        return (
            f"its attention ({', '.join(attention)}) is not supported; it needs {registry.NEEDS['attention']}, in "
            "torch.nn.MultiheadAttention or timm's Attention, and logits that depend on the class token alone"
        )
    return f"it does not have {registry.NEEDS[method.needs]}"
