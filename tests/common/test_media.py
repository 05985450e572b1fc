"""Opening of media files, with every PyAV that the package allows."""

import av
import numpy as np
import pytest

from mvit_jax.common.media import open_media
from mvit_jax.data.media.video import Video


@pytest.mark.parametrize("broken", [b"\xff\xfe\xe9\xa4\xe8\xc3", b"\xcf\xee\xf1\xf2\xee\xf0"])
def test_metadata_in_another_encoding_leaves_a_video_readable(broken, tmp_path):
    path = tmp_path / "titled.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "TITLED"
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(3):
            pixels = np.full((32, 32, 3), 80 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    file = path.read_bytes()
    assert file.count(b"TITLED") == 1
    path.write_bytes(file.replace(b"TITLED", broken))
    with open_media(str(path)) as container:
        assert set(container.metadata["title"]) - set("TITLED")
    with Video(path) as video:
        means = video.frames([0, 1, 2]).mean((1, 2, 3))
    np.testing.assert_allclose(means, [0, 80, 160], atol=4)
