"""The "Same function?" page as a notebook widget; importing this needs anywidget."""

import anywidget
import traitlets

from jax_scalegmn.report import _assets

_START = """
export default {
  render({ model, el }) {
    const page = sameFunction(el, model.get("networks"), {
      onTime(t) { model.set("t", t); model.save_changes(); },
    });
    page.setTime(model.get("t"));
    model.on("change:t", () => page.setTime(model.get("t")));
  },
};
"""


class SameFunction(anywidget.AnyWidget):
    """The page, whose slider is the trait `t`, to be read and set."""

    _esm = _assets.same_function_script() + _START
    _css = _assets.same_function_style()

    networks = traitlets.Dict().tag(sync=True)
    t = traitlets.Float(0.5, min=0.0, max=1.0).tag(sync=True)
