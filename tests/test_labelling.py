"""The labelling page in a real browser: keys, touches, reloads, and tables that the library reads."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, CONTROL, Browser
from PIL import Image

from ssl_jax.config import Data
from ssl_jax.data import open_source
from ssl_jax.errors import UserError
from ssl_jax.files import write_csv
from ssl_jax.labelling import write_page

ODD = [
    'say "hi", you.png',
    "=1+1.png",
    "-.png",
    "two\nlines.png",
    "</script><b>.png",
    "ünïcödé ☃.png",
    " a.png",
    "a\\b.png",
]
ODD_CLASSES = ["cat", 'a "b", c', "</script>", "=1+1", "-1", "naïve ☃; x", "'", "<!--"]
PHOTO = Path(__file__).parents[1] / "docs/phantom.jpg"
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}


def pictures(n, size=8, channels=3):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, channels), np.uint8)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, tmp_path):
    """Opens a page for n images; saves go to tmp_path/saved."""

    def open_page(names, classes, **options):
        path = tmp_path / "page.html"
        write_page(path, options.pop("images", pictures(len(names))), names, classes, **options)
        browser.open(path)
        browser.run("window.showSaveFilePicker = undefined")
        return browser

    browser.call(
        "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "saved"), eventsEnabled=True
    )
    yield open_page
    browser.run("localStorage.clear()")
    browser.call("Emulation.clearDeviceMetricsOverride")
    browser.call("Emulation.setTouchEmulationEnabled", enabled=False)


def state(browser):
    return browser.run("document.getElementById('state').textContent")


def message(browser):
    return browser.run("document.getElementById('message').textContent")


def saved(browser, folder):
    browser.events.clear()
    browser.press("s", modifiers=CONTROL)
    browser.wait("Browser.downloadProgress", state="completed")
    return (folder / "saved/labelled.csv").read_bytes().decode()


def test_labels_by_keyboard_undo_and_reload(page, tmp_path):
    browser = page([f"{i}.png" for i in range(5)], ["cat", "dog"])
    assert state(browser) == "Image 1 of 5: no label yet"
    browser.press("1", "2", "3", "0")  # there is no third class
    assert message(browser) == "Image 3 skipped." and state(browser) == "Image 4 of 5: no label yet"
    browser.press("1", "Backspace")
    assert state(browser) == "Image 4 of 5: no label yet"
    browser.press("z", modifiers=CONTROL)
    assert state(browser) == "Image 3 of 5: no label yet"
    browser.press("2", "ArrowLeft", "ArrowLeft")
    assert state(browser) == "Image 2 of 5: dog"
    browser.reload()
    browser.run("window.showSaveFilePicker = undefined")
    assert state(browser) == "Image 2 of 5: dog"
    browser.press("1")  # the next image without a label
    assert state(browser) == "Image 4 of 5: no label yet"
    assert saved(browser, tmp_path) == "path,label\n0.png,cat\n1.png,cat\n2.png,dog\n"
    assert message(browser) == "3 images saved in labelled.csv. 2 images without a label left out."
    browser.press("Backspace", "2", "0", "1")
    assert message(browser) == "Image 5: cat. That was the last one: save the labels."
    assert saved(browser, tmp_path) == "path,label\n0.png,cat\n1.png,dog\n2.png,dog\n4.png,cat\n"
    browser.click("#skipped")
    assert state(browser) == "Image 4 of 5: skipped"


def test_columns_as_the_settings_name_them(page, tmp_path):
    browser = page(["a.png", "b.png"], ["cat"], columns=("file", "kind"), more={"owner, id": [7, "=x"]})
    browser.press("1", "1")
    assert saved(browser, tmp_path) == 'file,"owner, id",kind\na.png,7,cat\nb.png,\'=x,cat\n'


def test_odd_names_come_back_as_they_were(page, tmp_path):
    images, folder = pictures(len(ODD)), tmp_path / "saved"
    folder.mkdir()
    for image, name in zip(images, ODD):
        (folder / name).parent.mkdir(exist_ok=True)  # "</script>" has a folder in front
        Image.fromarray(image).save(folder / name)
    browser = page(ODD, ODD_CLASSES, images=images)
    browser.press(*"12345678")
    text = saved(browser, tmp_path)
    paths = [f"./{name}" if name[0] in "=- " or "\\" in name else name for name in ODD]
    write_csv(tmp_path / "wanted.csv", ["path", "label"], list(zip(paths, ODD_CLASSES)))
    assert text == (tmp_path / "wanted.csv").read_text()
    source = open_source(Data(name="csv", path=str(folder / "labelled.csv"), size=8, max_bad_share=0.0))
    labels = [source.classes[label] for label in source.labels]
    assert labels == [name.replace("=1", "'=1") for name in ODD_CLASSES]  # as in the library's other tables
    np.testing.assert_array_equal(source.arrays(), images)


def test_several_classes_and_one_that_is_added_later(page, tmp_path):
    names, folder = [f"{i}.png" for i in range(5)], tmp_path / "saved"
    folder.mkdir()
    for image, name in zip(pictures(5), names):
        Image.fromarray(image).save(folder / name)
    browser = page(names, ["Mass", "Edema, mild"], multilabel=True)
    browser.press("1", "2", "Enter", "1", "2", "1", "Enter", "Enter", "1", "1")
    assert state(browser) == "Image 4 of 5: no label yet"
    browser.press("+")
    browser.type(" @home ")
    browser.press("Enter")
    assert message(browser) == "Class @home added."
    browser.press("3", "Enter", "0", "ArrowLeft", "ArrowLeft", "ArrowLeft", "3")
    assert state(browser) == "Image 2 of 5: Edema, mild, @home"
    wanted = 'path,Mass,"Edema, mild",\'@home\n0.png,1,1,\n1.png,0,1,1\n2.png,0,0,\n3.png,0,0,1\n'
    assert saved(browser, tmp_path) == wanted
    labels = ("Mass", "Edema, mild", "'@home")
    source = open_source(Data(name="csv", path=str(folder / "labelled.csv"), labels=labels))
    unknown = np.nan
    np.testing.assert_array_equal(source.labels, [[1, 1, unknown], [0, 1, 1], [0, 0, unknown], [0, 0, 1]])


def test_classes_are_added_and_checked(page):
    browser = page(["a.png", "b.png"], [])
    assert state(browser) == "Image 1 of 2: add a class to begin"
    browser.type("cat")  # the field has the focus
    browser.press("Enter", "1")
    assert state(browser) == "Image 2 of 2: no label yet"
    for text, answer in (
        ("CAT", "There is a class cat already."),
        ("NaN", "In a table, nan means that there is no label."),
    ):
        browser.press("+")
        browser.type(text)
        browser.press("Enter")
        assert message(browser) == answer
        browser.run("document.getElementById('entry').value = ''")
        browser.press("Escape")
    browser.press("Backspace", "Backspace")
    assert state(browser) == "Image 1 of 2: add a class to begin"


def test_a_second_save_replaces_the_file_that_was_chosen(page):
    browser = page(["a.png", "b.png"], ["cat", "dog"])
    browser.run("""window.files = {}, window.asked = 0;
        window.showSaveFilePicker = async ({ suggestedName }) => (asked++, { name: suggestedName,
          createWritable: async () => ({ write: text => files[suggestedName] = text, close() {} }) })""")
    browser.press("s", modifiers=CONTROL)
    assert message(browser) == "Nothing to save yet: no image has a label."
    for key in "12":
        browser.press(key)
        browser.run("save()")
    assert browser.run("[asked, files]") == [1, {"labelled.csv": "path,label\na.png,cat\nb.png,dog\n"}]
    browser.run("file = undefined; showSaveFilePicker = async () => { throw new DOMException('', 'AbortError') }")
    browser.run("save()")
    assert message(browser) == "Not saved."


def test_on_a_phone(page):
    classes = [f"a class with quite a long name {i}" for i in range(40)]
    browser = page([f"{'long' * 40}{i}.png" for i in range(3)], classes, multilabel=True)
    browser.call("Emulation.setDeviceMetricsOverride", **PHONE)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    browser.press("z", "0")  # the 35th class has the last key
    assert browser.run("document.documentElement.scrollWidth") == 390
    script = """[...document.querySelectorAll("button, input")].map(e => [e.id, e.getBoundingClientRect()])
        .filter(([, box]) => box.width && Math.min(box.width, box.height) < 44).map(([id]) => id)"""
    assert browser.run(script) == []
    box = browser.run("JSON.parse(JSON.stringify(document.getElementById('picture').getBoundingClientRect()))")
    assert box["width"] > 350 and box["height"] > 250
    assert state(browser).startswith("Image 2 of 3")
    for start, end, image in ((300, 100, 3), (100, 300, 2), (100, 120, 2)):
        for kind, x in (("touchStart", start), ("touchMove", end), ("touchEnd", None)):
            points = [] if x is None else [{"x": x, "y": box["y"] + 50}]
            browser.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
        assert state(browser).startswith(f"Image {image} of 3")


def test_every_control_has_a_name_and_can_be_reached_by_tab(page):
    browser = page(["a.png", "b.png", "c.png"], ["cat", "dog"], multilabel=True)
    reached = []
    for _ in range(10):
        browser.press("Tab")
        reached.append(browser.run("document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"))
    assert reached == ["cat", "dog", "Name of a new class", "", "back", "forth", "undo", "skip", "next", "save"]
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.run("document.querySelector('#classes button').focus()")
    browser.press("Enter")  # presses the button that has the focus, rather than ending the image
    assert state(browser) == "Image 1 of 3: cat"
    assert browser.run("document.activeElement.getAttribute('aria-label')") == "cat"
    browser.click("#classes > :nth-child(2)")
    browser.press("Enter")  # after a click, Enter ends the image
    assert message(browser) == "Image 1: cat, dog."


def test_says_when_the_browser_will_not_remember(page):
    browser = page(["a.png"], ["cat"])
    hidden = "document.getElementById('forgets').hidden"
    assert browser.run(hidden)
    browser.run("Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError') }")
    browser.press("1")
    assert not browser.run(hidden)
    leave = "dispatchEvent(new Event('beforeunload', { cancelable: true }))"
    assert not browser.run(leave)  # the browser asks first
    browser.run("state.saved = true")
    assert browser.run(leave)


def test_nothing_on_the_page_comes_from_elsewhere(tmp_path):
    write_page(tmp_path / "page.html", pictures(2), ["</script>", "<!--"], ["<b>"])
    text = (tmp_path / "page.html").read_text()
    assert text.count("</script>") == 2 and "<!--" not in text and "<b>" not in text
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|url\(|@import", text)
    assert "default-src 'none'" in text


def test_small_pictures_are_exact_and_large_ones_close(tmp_path):
    small, large = pictures(1, 28, channels=1)[0], np.asarray(Image.open(PHOTO).convert("RGB").resize((224, 160)))
    write_page(tmp_path / "page.html", [small, large], ["a", "b"], [])
    shown = re.findall(r"data:image/(\w+);base64,([^\"]+)", (tmp_path / "page.html").read_text())
    assert [kind for kind, _ in shown] == ["png", "jpeg"]
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))) for _, code in shown]
    np.testing.assert_array_equal(decoded[0], small[..., 0])
    assert decoded[1].shape == large.shape and np.abs(decoded[1] - large.astype(float)).mean() < 3


@pytest.mark.parametrize(
    ("classes", "multilabel", "problem"),
    [
        (["cat", " "], False, "classes='': no label; allowed: 1 to 255 characters, not nan"),
        (["NaN"], False, "classes='NaN': no label"),
        (["cat", " cat"], False, "classes='cat': there already; allowed: names that differ$"),
        (["cat", "Cat"], True, "classes='Cat': there already; .*, not only in case"),
        (["a;b"], True, "classes='a;b': no name for a column"),
        (["Path"], True, "classes='Path': no name for a column"),
    ],
)
def test_classes_that_no_table_can_hold(tmp_path, classes, multilabel, problem):
    with pytest.raises(UserError, match=problem):
        write_page(tmp_path / "page.html", pictures(1), ["a.png"], classes, multilabel=multilabel)
    with pytest.raises(UserError, match="there are no images to label"):
        write_page(tmp_path / "page.html", [], [], [])
