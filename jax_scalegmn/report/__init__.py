"""Pages of one HTML file: two networks moved, aligned and merged in a browser, and reports in the same style."""

from jax_scalegmn.report._charts import Line, line_chart
from jax_scalegmn.report._page import Page, document, same_function, widget
from jax_scalegmn.report._parallel import parallel_coordinates

__all__ = ["Line", "Page", "document", "line_chart", "parallel_coordinates", "same_function", "widget"]
