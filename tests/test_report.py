"""Pages as a reader has them, in headless Chromium: what they show, and that it is what Python computes."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_scalegmn as sg

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1240,1000"),
)
# How tests speak with the page: what `sameFunction` returned.
PAGE = 'const page = document.getElementById("same-function").page; '


# --- networks -----------------------------------------------------------------------------------------------------


def planted(arch):
    """A network near another one, moved by a random element; the other one; the element that moves it back."""
    # Drawn by NumPy: programs for a few random numbers of each architecture would take longer than the test.
    rng = np.random.default_rng(0)
    shapes = sg.architecture.abstract_params(arch)

    def draw(size):
        return jax.tree.map(lambda leaf: rng.normal(0, size, leaf.shape).astype(np.float32), shapes)

    target = draw(0.05)
    near = jax.tree.map(np.add, target, draw(0.002))
    scales = {"sign": lambda n: rng.choice([-1.0, 1.0], n), "positive": lambda n: np.exp(rng.normal(0, 0.5, n))}
    scales["nonzero"] = lambda n: scales["sign"](n) * scales["positive"](n)
    element = sg.Element(
        {layer.name: jnp.asarray(rng.permutation(layer.width)) for layer in arch.hidden},
        {
            layer.name: jnp.asarray(scales.get(layer.scaling.value, np.ones)(layer.width), float)
            for layer in arch.hidden
        },
    )
    return act(arch, element, near), target, inverse(arch, element)


act, inverse = jax.jit(sg.symmetry.act), jax.jit(sg.symmetry.inverse)


def images(arch, params, size):
    """What a network draws, [pixels * channels], by JAX."""
    return np.asarray(outputs(arch, params, sg.network.coordinates(*size)), np.float64).reshape(-1)


@jax.jit
def outputs(arch, params, places):
    return jax.vmap(lambda x: sg.network.apply(arch, params, x))(places)


def distance(params, target):
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True))
    return sum(float(((p - t) ** 2).sum()) for p, t in pairs) / sum(float((t**2).sum()) for _, t in pairs)


SIREN = sg.siren((2, 16, 16, 1))
SIZE = (12, 10)


@pytest.fixture(scope="module")
def siren():
    """The params, the target, and the params aligned by weight matching."""
    params, target, _ = planted(SIREN)
    return params, target, sg.matching.align(SIREN, params, target)


@pytest.fixture(scope="module")
def siren_page(siren):
    return sg.report.same_function(SIREN, *siren[:2], size=SIZE, names=("B", "A"))


# --- the browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Opens pages; a test that opened one fails if the console has an error or anything was requested."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium is not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.chrome.service.Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a page of its own and returns the driver."""

    def open_page(page, name="page.html"):
        path = page.save(tmp_path / name)
        assert path.stat().st_size < 500_000
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(path.as_uri())
        return browser

    yield open_page
    assert console(browser) == []
    assert [url for url in requests(browser) if not url.startswith(("file:", "data:"))] == []


def console(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def requests(browser):
    """What pages in files asked for; the browser's first tab is a page of its own."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [one["request"]["url"] for one in asked if one["documentURL"].startswith("file:")]


def ask(browser, expression):
    return browser.execute_script(f"{PAGE} return {expression};")


def pixels(browser, method, t):
    return np.asarray(ask(browser, f"page.image('{method}', {t})"))


def click(browser, *labels):
    for label in labels:
        browser.find_element("xpath", f"//button[normalize-space()='{label}']").click()


def buttons(browser):
    return [button.text for button in browser.find_elements("css selector", ".sg-buttons button")]


def press(browser, *keys):
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


# --- what the page computes ---------------------------------------------------------------------------------------


def test_moves_change_the_weights_and_not_the_pixels(show, siren_page):
    browser = show(siren_page)
    before = pixels(browser, "naive", 0)
    click(browser, "Align")
    near = ask(browser, "page.distance()")
    for moves in (["Shuffle neurons"], ["Flip signs"], ["Shuffle neurons", "Flip signs"]):
        click(browser, "Align", *moves)
        assert ask(browser, "page.distance()") > 10 * near
        assert np.abs(pixels(browser, "naive", 0) - before).max() < 1e-5


def test_alignment_after_moves_is_that_of_python(show, siren, siren_page):
    params, target, aligned = siren
    browser = show(siren_page)
    click(browser, "Shuffle neurons", "Flip signs", "Shuffle neurons", "Align")
    assert ask(browser, "page.distance()") == pytest.approx(distance(aligned, target), rel=1e-5)
    blend = (images(SIREN, params, SIZE) + images(SIREN, target, SIZE)) / 2
    middle = images(SIREN, sg.merge.lerp(aligned, target, 0.5), SIZE)
    for method in ("naive", "aligned"):
        np.testing.assert_allclose(pixels(browser, method, 0.5), middle, atol=1e-4)
        assert ask(browser, f"page.loss('{method}', 0.5)") == pytest.approx(((middle - blend) ** 2).mean(), abs=1e-5)
    click(browser, "Reset")
    naive = images(SIREN, sg.merge.lerp(params, target, 0.5), SIZE)
    assert ask(browser, "page.loss('naive', 0.5)") == pytest.approx(((naive - blend) ** 2).mean(), abs=1e-5)
    assert ask(browser, "page.distance()") == pytest.approx(distance(params, target), rel=1e-5)


def test_the_curve_is_python_s_barrier_against_a_true_image(show, siren):
    params, target, aligned = siren
    truth = images(SIREN, target, SIZE).reshape(SIZE)
    browser = show(sg.report.same_function(SIREN, params, target, image=truth, num_points=5))
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    for method, start in (("naive", params), ("aligned", aligned)):
        points = [images(SIREN, sg.merge.lerp(start, target, t), SIZE) for t in np.linspace(0, 1, 5)]
        losses = [((point - truth.reshape(-1)) ** 2).mean() for point in points]
        np.testing.assert_allclose(ask(browser, f"page.losses('{method}')"), losses, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", pytest.param("abs", marks=pytest.mark.slow)])
def test_positive_scales_and_colors(show, activation):
    arch = sg.mlp((2, 8, 8, 3), activation)
    params, target, element = planted(arch)
    browser = show(sg.report.same_function(arch, params, target, element=element, size=(6, 5)))
    flips = ["Flip signs"] if activation == "abs" else []
    assert buttons(browser) == ["Shuffle neurons", *flips, "Rescale", "Align", "Reset"]
    before = pixels(browser, "naive", 0)
    click(browser, "Align")
    near = ask(browser, "page.distance()")
    click(browser, "Rescale", "Shuffle neurons", *flips)
    assert ask(browser, "page.distance()") > 10 * near
    assert np.abs(pixels(browser, "naive", 0) - before).max() < 1e-5
    click(browser, "Align")
    assert ask(browser, "page.distance()") == pytest.approx(near)
    middle = sg.merge.lerp(act(arch, element, params), target, 0.5)
    np.testing.assert_allclose(pixels(browser, "naive", 0.5), images(arch, middle, (6, 5)), atol=1e-5)


def test_every_activation_is_that_of_jax(show):
    names = [*sorted(sg.architecture.SCALING_OF_ACTIVATION), "leaky_relu(0.3)"]
    arch = sg.mlp((2, *[4] * len(names), 1), names)
    params, target, element = planted(arch)
    browser = show(sg.report.same_function(arch, params, target, element=element, size=(7, 9)))
    assert buttons(browser) == ["Shuffle neurons", "Flip signs", "Rescale", "Align", "Reset"]
    np.testing.assert_allclose(pixels(browser, "naive", 0), images(arch, params, (7, 9)), atol=1e-5)


def test_a_convolution_s_weights_move_as_in_python(show):
    arch = sg.cnn((1, 4, 6), 3, flatten=(9, 9))
    params, target, element = planted(arch)
    browser = show(sg.report.same_function(arch, params, target, element=element))
    assert ask(browser, "page.distance()") == pytest.approx(distance(params, target), rel=1e-5)
    click(browser, "Shuffle neurons", "Align")
    aligned = act(arch, element, params)
    assert ask(browser, "page.distance()") == pytest.approx(distance(aligned, target), rel=1e-4)
    text = browser.find_element("css selector", "main").text
    assert "cannot draw the network’s function" in text
    assert "Conv" in text
    assert "no loss was given" in text


@pytest.mark.slow
def test_a_loss_of_the_user_s_is_drawn_for_networks_without_an_image(show):
    arch = sg.mlp((3, 6, 4), "gelu")
    params, target, element = planted(arch)

    def size_of_weights(params):
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(params))

    browser = show(sg.report.same_function(arch, params, target, element=element, loss=size_of_weights, num_points=7))
    assert buttons(browser) == ["Shuffle neurons", "Align", "Reset"]
    aligned = act(arch, element, params)
    for method, start in (("naive", params), ("aligned", aligned)):
        losses = sg.landscape.barrier(size_of_weights, start, target, num_points=7).losses
        np.testing.assert_allclose(ask(browser, f"page.losses('{method}')"), losses, rtol=1e-5)
    assert "size_of_weights" in browser.find_element("css selector", "main").text
    assert len(browser.find_elements("css selector", "canvas.picture")) == 0


@pytest.mark.slow
def test_a_large_network_is_averaged_and_aligned(show):
    arch = sg.mlp((64, 128, 128, 10), "relu")
    params, target, element = planted(arch)
    browser = show(sg.report.same_function(arch, params, target, element=element))
    assert buttons(browser) == ["Align", "Reset"]
    assert ask(browser, "page.distance()") == pytest.approx(distance(params, target), rel=1e-4)
    click(browser, "Align")
    aligned = act(arch, element, params)
    assert ask(browser, "page.distance()") == pytest.approx(distance(aligned, target), rel=1e-3)
    assert "too many parameters" in browser.find_element("css selector", "main").text


# --- what the page shows ------------------------------------------------------------------------------------------


def test_keyboard_alone_reaches_everything(show, siren, siren_page):
    from selenium.webdriver import Keys

    browser = show(siren_page)

    def focused(script):
        return browser.execute_script(f"const e = document.activeElement, s = getComputedStyle(e); return {script};")

    reached = []
    for _ in range(40):
        press(browser, Keys.TAB)
        name = focused("e.getAttribute('aria-label') || e.innerText")
        if name in reached or focused("e === document.body"):
            break
        assert focused("s.outlineStyle") == "solid", name
        assert focused("parseFloat(s.outlineWidth)") >= 2, name
        reached.append(name)
        if name == "Align":
            press(browser, Keys.ENTER)
            assert ask(browser, "page.distance()") == pytest.approx(distance(siren[2], siren[1]), rel=1e-5)
        if name == "Neurons of hidden_1 in A":
            press(browser, Keys.END, Keys.ARROW_LEFT)
            told = focused("e.getAttribute('aria-valuetext')")
            assert told.startswith("hidden_1, neuron 14 of A: partner ")
            assert told.endswith(" of the remaining distance")
        if name.startswith("t, from"):
            press(browser, Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
            assert ask(browser, "page.time()") == pytest.approx(0.02)
    bars = [f"Neurons of hidden_{layer} in {name}" for layer in (0, 1) for name in "AB"]
    assert {"Shuffle neurons", "Flip signs", "Align", "Reset", "t, from B at 0 to A at 1", *bars} <= set(reached)
    parts = "[...document.querySelectorAll('button, input, [tabindex], [role=img]')]"
    assert browser.execute_script(f"return {parts}.filter((e) => !e.ariaLabel && !e.innerText).length") == 0


def test_pointing_at_a_weight_shows_the_partner_and_its_share(show, siren, siren_page):
    from selenium.webdriver import ActionChains

    params, target, _ = siren
    browser = show(siren_page)
    weights = browser.find_elements("css selector", "canvas.weights")[0]
    ActionChains(browser).move_to_element_with_offset(weights, 1 - weights.size["width"] // 2, 0).perform()
    neuron = ask(browser, "page.neuron()")
    element = sg.matching.weight_matching(SIREN, params, target).element
    assert neuron["layer"] == "hidden_0"
    assert neuron["target"] == 0
    assert neuron["params"] == int(element.permutation["hidden_0"][0])
    assert neuron["scale"] == float(element.scale["hidden_0"][0])
    shown = browser.find_element("css selector", ".sg-neuron").text
    assert f"{100 * neuron['share']:.{1 if neuron['share'] < 0.0995 else 0}f} %" in shown
    # After a move the partner is elsewhere, and still the same neuron.
    click(browser, "Align")
    ActionChains(browser).move_to_element_with_offset(weights, 1 - weights.size["width"] // 2, 0).perform()
    assert ask(browser, "page.neuron().params") == 0


def test_shares_of_the_remaining_distance_add_up():
    arch = sg.mlp((3, 4, 5, 2), "tanh")
    params, target, _ = planted(arch)
    values = [[np.asarray(v) for v in sg.architecture.unpack(arch, p)] for p in (params, target)]
    from jax_scalegmn.report import _networks

    shares = _networks.shares(arch, *values)
    without_hidden = ((params["Dense_2"]["bias"] - target["Dense_2"]["bias"]) ** 2).sum()
    total = sum(((p - t) ** 2).sum() for p, t in zip(*values, strict=True))
    assert sum(sum(parts) for parts in shares.values()) + without_hidden / total == pytest.approx(1, abs=1e-4)


def test_a_chart_s_values_are_read_by_keyboard_and_its_lines_hidden(show):
    from selenium.webdriver import Keys

    lines = [
        sg.report.Line(f"method {i}", [0, 0.5, 1], [i + 1, 2 * i + 1, i + 1], [i] * 3, [3 * i + 2] * 3)
        for i in range(9)
    ]
    browser = show(sg.report.document("Nine bands", [sg.report.line_chart(lines, x="t", y="loss")]))
    chart = browser.find_element("css selector", ".sg-chart > svg")
    browser.execute_script("arguments[0].focus()", chart)
    press(browser, Keys.HOME, Keys.ARROW_RIGHT)
    assert chart.get_attribute("aria-valuetext").startswith("t 0.5: method 0 1, method 1 3, method 2 5")
    assert len(browser.find_elements("css selector", ".sg-chart .curve")) == 9
    browser.find_elements("css selector", ".sg-legend button")[3].click()
    assert len(browser.find_elements("css selector", ".sg-chart .curve")) == 8


# --- what Python returns ------------------------------------------------------------------------------------------


def test_a_page_in_a_notebook_is_a_frame(siren_page):
    assert siren_page._repr_html_() == siren_page.iframe()
    assert siren_page.iframe(height=700).count("<") == 2
    assert "height: 700px" in siren_page.iframe(height=700)


def test_names_cannot_leave_the_data(show, siren):
    page = sg.report.same_function(SIREN, *siren[:2], names=("</script><b>B", "A"), title="<i>&", size=(4, 4))
    browser = show(page)
    assert browser.title == "<i>&"
    assert browser.find_element("css selector", "h1").text == "<i>&"
    assert "</script><b>B" in browser.find_element("css selector", ".sg-lead").text


def test_the_widget_has_the_page_and_its_time(siren):
    pytest.importorskip("anywidget")
    widget = sg.report.widget(SIREN, *siren[:2], size=(4, 4))
    assert widget.networks["image"]["size"] == [4, 4]
    assert "export default" in str(widget._esm)
    widget.t = 0.25
    assert widget.get_state()["t"] == 0.25


def test_without_anywidget_the_error_names_the_extra(monkeypatch, siren):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "jax_scalegmn.report._widget", raising=False)
    monkeypatch.delattr(sg.report, "_widget", raising=False)
    with pytest.raises(ImportError, match=r'pip install "jax-scalegmn\[notebook\]"'):
        sg.report.widget(SIREN, *siren[:2])


@pytest.mark.slow
def test_the_library_imports_neither_anywidget_nor_selenium():
    code = "import sys, jax_scalegmn.report; print(sorted({'anywidget', 'selenium', 'ipywidgets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


BAD = {
    "other architecture": (
        {"target": sg.network.init(sg.siren((2, 8, 1)), jax.random.key(0))},
        r"target\['Dense_0'\]\['kernel'\]",
    ),
    "one name": ({"names": ("x", "x")}, "two different words"),
    "one point": ({"num_points": 1}, "at least its 2 end points"),
    "image of other channels": ({"image": np.zeros((4, 4, 3))}, r"\[height, width, 1\]"),
    "size of another image": ({"image": np.zeros((4, 4)), "size": (5, 5)}, "Leave out size"),
    "no pixels": ({"size": (0, 4)}, "a size like"),
    "too many pixels": ({"size": (1000, 1000)}, "a smaller image"),
    "infinite loss": ({"loss": lambda params: params["Dense_0"]["bias"].sum() / 0.0}, "NaN or infinite"),
    "element of another": ({"element": sg.symmetry.identity(sg.siren((2, 8, 1)))}, "element"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(siren, name):
    options, message = BAD[name]
    given = {"params": siren[0], "target": siren[1], "element": sg.symmetry.identity(SIREN)} | options
    with pytest.raises(ValueError, match=message):
        sg.report.same_function(SIREN, **given)


def test_what_is_no_image_takes_no_image():
    arch = sg.mlp((3, 4, 2))
    params = sg.network.init(arch, jax.random.key(0))
    with pytest.raises(ValueError, match="cannot be drawn"):
        sg.report.same_function(arch, params, params, size=(4, 4))


def test_nan_is_named():
    params = sg.network.init(SIREN, jax.random.key(0))
    broken = params | {"Dense_1": {**params["Dense_1"], "bias": jnp.full(16, jnp.nan)}}
    with pytest.raises(ValueError, match=r"params\['Dense_1'\]\['bias'\].*NaN"):
        sg.report.same_function(SIREN, broken, params)


@pytest.mark.parametrize(
    ("lines", "log"),
    [
        ([], False),
        ([("a", [0], [1]), ("a", [0], [1])], False),
        ([("a", [0, 1], [1])], False),
        ([("a", [0], [0])], True),
    ],
)
def test_bad_lines_are_refused(lines, log):
    with pytest.raises(ValueError, match="expected"):
        sg.report.line_chart([sg.report.Line(*line) for line in lines], x="t", y="loss", log=log)
