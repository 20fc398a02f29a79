"""Pages of one HTML file: two networks moved, aligned and merged in a browser, and reports in the same style."""

from jax_scalegmn.report._charts import Line, line_chart
from jax_scalegmn.report._page import Page, document, same_function, widget

__all__ = ["Line", "Page", "document", "line_chart", "same_function", "widget"]
