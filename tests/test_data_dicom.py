"""DICOM: what values become gray levels, which files can't be read and what is said of them, and what is never said."""

import io
import logging

import numpy as np
import pytest

from ssl_jax.config import Data
from ssl_jax.data import decoding as image_files
from ssl_jax.data import dicom, open_source
from ssl_jax.errors import UnreadableError, UserError

pydicom = pytest.importorskip("pydicom")

from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.pixels import apply_windowing, pixel_array  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, generate_uid  # noqa: E402

SECRET, PRIVATE = "Doe^Jane", "ward 7, bed 3"
pytestmark = pytest.mark.filterwarnings("ignore:The pixel data is")  # pytest undoes the reader's own filter


def shipped(name):
    """A file that comes with pydicom; never one that it would download."""
    return get_testdata_file(name, download=False)


def content(name):
    with open(shipped(name), "rb") as file:  # noqa: PTH123 - pydicom gives text
        return file.read()


def made(values, kind="MONOCHROME2", **tags):
    """A DICOM file of unsigned 16-bit `values`, or whatever their dtype says, of a patient with a name."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid(entropy_srcs=["a"])
    data.PatientName, data.PatientID, data.PatientComments = SECRET, "4711-" + SECRET, PRIVATE
    data.private_block(0x0011, SECRET, create=True).add_new(1, "LO", PRIVATE)
    data.Rows, data.Columns = values.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, kind
    data.BitsAllocated = data.BitsStored = 8 * values.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(values.dtype.kind == "i")
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = values.tobytes()
    file = io.BytesIO()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()


def put(path, *args, **tags):
    path.write_bytes(made(*args, **tags))
    return path


RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 50


def gray(*args, window="auto", **tags):
    return dicom.decode(made(*args, **tags), window).astype(int)


# Values


def test_window_by_hand():
    """PS3.3 C.11.2.1.2.1: centre 1000, width 401 maps 799.5 to 0 and 1199.5 to 255."""
    found = gray(RAMP, WindowCenter=1000, WindowWidth=401)
    np.testing.assert_array_equal(found, np.round(np.clip((RAMP - 799.5) / 400, 0, 1) * 255))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window_is_pydicoms(function):
    tags = {
        "WindowCenter": [1500, 9],
        "WindowWidth": [1200, 9],
        "VOILUTFunction": function,
        "BitsStored": 12,
        "HighBit": 11,
    }
    data = pydicom.dcmread(io.BytesIO(made(RAMP, **tags)))
    expected = apply_windowing(pixel_array(data), data) / 4095 * 255  # over the range of 12 bits
    np.testing.assert_allclose(gray(RAMP, **tags), expected, atol=0.51)


def test_rescale_comes_before_the_window():
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1024, "WindowCenter": 976.5, "WindowWidth": 801}
    expected = np.round(np.clip((RAMP * 2.0 - 1024 - 576) / 800, 0, 1) * 255)
    np.testing.assert_array_equal(gray(RAMP, **tags), expected)


def test_voi_table():
    table = Dataset()
    table.LUTDescriptor = [4, 100, 8]  # values up to 100, 101, 102, 103 and more
    table.add_new("LUTData", "US", [10, 20, 30, 40])
    values = np.array([[0, 100], [101, 999]], np.uint16)
    tags = {"VOILUTSequence": [table], "WindowCenter": 1, "WindowWidth": 2}
    assert gray(values, **tags).tolist() == [[10, 10], [20, 40]]


def test_modality_table():
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [3, 0, 16], "US"
    table.add_new("LUTData", "US", [0, 1000, 250])
    values = np.array([[0, 1], [2, 2]], np.uint16)
    found = gray(values, ModalityLUTSequence=[table], WindowCenter=500.5, WindowWidth=1001)
    assert found.tolist() == [[0, 255], [64, 64]]


@pytest.mark.parametrize("window,tags", [("auto", {}), ("percentile", {"WindowCenter": 1000, "WindowWidth": 401})])
def test_percentiles(window, tags):
    low, high = np.percentile(RAMP, [0.5, 99.5])
    expected = np.round(np.clip((RAMP - low) / (high - low), 0, 1) * 255)
    np.testing.assert_array_equal(gray(RAMP, window=window, **tags), expected)


def test_padding_does_not_count():
    values = np.where(np.arange(8) < 4, 0, 1000 + RAMP // 50).astype(np.uint16)
    found = gray(values, PixelPaddingValue=0)
    inside = values[:, 4:]
    low, high = np.percentile(inside, [0.5, 99.5])
    np.testing.assert_array_equal(found[:, 4:], np.round(np.clip((inside - low) / (high - low), 0, 1) * 255))
    assert (found[:, :4] == 0).all()


@pytest.mark.parametrize("tags", [{}, {"WindowCenter": 1000, "WindowWidth": 401}])
def test_monochrome1_is_inverted(tags):
    upright, inverted = gray(RAMP, **tags), gray(RAMP, "MONOCHROME1", **tags)
    assert abs(upright + inverted - 255).max() <= 1
    assert upright[0, 0] == 0 and inverted[0, 0] == 255


@pytest.mark.parametrize("tags", [{"WindowCenter": 5, "WindowWidth": 0}, {"WindowCenter": "", "WindowWidth": ""}])
def test_window_that_means_nothing_is_none(tags):
    np.testing.assert_array_equal(gray(RAMP, **tags), gray(RAMP))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
def test_depths(dtype):
    values = (np.arange(64).reshape(8, 8) - (32 if dtype == np.int16 else 0)).astype(dtype)
    found = gray(values)
    assert found.min() == 0 and found.max() == 255 and (np.diff(found.ravel()) >= 0).all()


def test_one_value_alone_has_no_range():
    assert (gray(np.full((8, 8), 7, np.uint16)) == 0).all()


# Real files


@pytest.mark.parametrize(
    "name",
    ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_padded.dcm"],
)
def test_same_image_in_every_transfer_syntax(name):
    """MR_small has the window 600, 1600, which its values leave at the upper end."""
    values = pixel_array(shipped("MR_small.dcm")).astype(float)
    expected = np.round(np.clip((values - 599.5) / 1599 + 0.5, 0, 1) * 255)
    np.testing.assert_array_equal(dicom.decode(content(name), "auto"), expected)


def test_colours():
    whole = pixel_array(shipped("examples_rgb_color.dcm"))
    np.testing.assert_array_equal(dicom.decode(content("examples_rgb_color.dcm"), "auto"), whole)
    deep = pixel_array(shipped("SC_rgb_rle_16bit.dcm"))
    np.testing.assert_array_equal(dicom.decode(content("SC_rgb_rle_16bit.dcm"), "auto"), deep >> 8)
    assert dicom.decode(content("examples_palette.dcm"), "auto").shape == (350, 800, 3)
    # A video in luma and chroma: its first frame, as RGB.
    first = pixel_array(shipped("examples_ybr_color.dcm"), index=0)
    np.testing.assert_array_equal(dicom.decode(content("examples_ybr_color.dcm"), "auto"), first)


def test_first_frame():
    frames = pixel_array(shipped("rtdose.dcm"))
    assert frames.shape[0] == 15
    low, high = np.percentile(frames[0], [0.5, 99.5])
    expected = np.round(np.clip((frames[0] - low) / (high - low), 0, 1) * 255)
    np.testing.assert_array_equal(dicom.decode(content("rtdose.dcm"), "auto"), expected)


def test_one_channel_and_size():
    assert image_files.decode(content("CT_small.dcm"), 32, 1).shape == (32, 32, 1)
    colours = image_files.decode(content("CT_small.dcm"), 32, 3)
    assert colours.shape == (32, 32, 3) and (colours[..., 0] == colours[..., 2]).all()


@pytest.mark.parametrize(
    "name,words",
    [
        ("MR_small_jpeg_ls_lossless.dcm", "JPEG-LS Lossless.*pip install pylibjpeg pylibjpeg-libjpeg"),
        ("JPEG-lossy.dcm", "JPEG Extended.*pip install pylibjpeg pylibjpeg-libjpeg"),
        ("GDCMJ2K_TextGBR.dcm", "JPEG 2000.*pip install pylibjpeg pylibjpeg-openjpeg"),
        ("MR_truncated.dcm", "cannot be decoded.*damaged"),
        ("rtplan.dcm", "DICOM without an image"),
        ("test-SR.dcm", "DICOM without an image"),
        ("badVR.dcm", "damaged"),
    ],
)
def test_files_that_cannot_be_read(name, words):
    with pytest.raises(UnreadableError, match=words) as error:
        dicom.decode(content(name), "auto")
    assert "\n" not in str(error.value)


def test_missing_decompressor_is_found_when_the_data_are_opened(tmp_path):
    (tmp_path / "a.dcm").write_bytes(content("MR_small_jpeg_ls_lossless.dcm"))
    with pytest.raises(UserError, match="'a.dcm': DICOM compressed as JPEG-LS.*pip install"):
        open_source(Data(name="folder", path=str(tmp_path), size=8))


def test_without_pydicom(tmp_path, monkeypatch):
    put(tmp_path / "a.dcm", RAMP)
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    dicom._pydicom.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'ssl_jax\[dicom\]'"):
        open_source(Data(name="folder", path=str(tmp_path), size=8))


# In folders and tables


def test_folder_of_mixed_files(tmp_path):
    put(tmp_path / "a.dcm", RAMP)
    put(tmp_path / "b.DCM", RAMP, "MONOCHROME1")
    image_files.Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / "c.png")
    source = open_source(Data(name="folder", path=str(tmp_path), size=8, channels=1))
    assert source.names == ["a.dcm", "b.DCM", "c.png"]
    a, b, c = source.arrays()[..., 0].astype(int)
    assert abs(a + b - 255).max() <= 1 and abs(a - c).max() <= 3


def test_table_takes_a_dicom_without_an_ending(tmp_path):
    put(tmp_path / "IM000001", RAMP)
    (tmp_path / "list.csv").write_text("path\nIM000001\n")
    source = open_source(Data(name="csv", path=str(tmp_path / "list.csv"), size=8, channels=1))
    np.testing.assert_array_equal(source.load(0)[..., 0], gray(RAMP))


def test_percentiles_of_16_bit_png(tmp_path):
    values = RAMP.copy()
    values[0, 0] = 60000  # one bright pixel leaves the rest dark unless percentiles are asked for
    big = np.kron(values, np.ones((8, 8), np.uint16))
    big[0, :8] = 3000
    image_files.Image.fromarray(big).save(tmp_path / "a.png")
    auto, percentile = (
        open_source(Data(name="folder", path=str(tmp_path), size=64, channels=1, window=w)).load(0).astype(int)
        for w in ("auto", "percentile")
    )
    np.testing.assert_array_equal(auto[..., 0], np.round((big - big.min()) / (60000.0 - big.min()) * 255))
    low, high = np.percentile(big, [0.5, 99.5])
    np.testing.assert_array_equal(percentile[..., 0], np.round(np.clip((big - low) / (high - low), 0, 1) * 255))


# What is never said


def test_names_and_private_tags_stay_in_the_file(tmp_path, caplog, capfd, recwarn):
    """Sound and damaged files of a patient with a name: neither messages nor the cache hold anything of it."""
    caplog.set_level(logging.DEBUG)
    data = tmp_path / "data"
    data.mkdir()
    whole = made(RAMP, WindowCenter=1000, WindowWidth=401)
    for i in range(4):
        (data / f"good{i}.dcm").write_bytes(whole)
    (data / "cut.dcm").write_bytes(whole[:-40])
    (data / "header.dcm").write_bytes(whole[: whole.index(SECRET.encode()) + 3])
    # Values that can't be: where rows should be there is the name, and a number that is none.
    (data / "rows.dcm").write_bytes(made(RAMP, WindowCenter=1, WindowWidth=2).replace(b"DS\x02\x001 ", b"DS\x02\x00D "))
    (data / "empty.dcm").write_bytes(whole[:132])
    settings = Data(name="folder", path=str(data), size=8, channels=1, cache=str(tmp_path / "cache"), max_bad_share=0.9)
    source = open_source(settings)
    source.arrays()
    with pytest.raises(UserError) as error:
        open_source(Data(name="folder", path=str(data), size=8, max_bad_share=0.0)).arrays()
    said = [str(error.value), caplog.text, *capfd.readouterr(), *(str(w.message) for w in recwarn), *source.skipped]
    said += [path.read_bytes().decode("latin-1") for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(source.skipped) >= 3
    for text in said:
        for secret in ("Doe", "Jane", "4711", "ward", "bed"):
            assert secret not in text
