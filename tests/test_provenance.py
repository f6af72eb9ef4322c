import json
import random
import shutil
from pathlib import Path

import av
import c2pa
import numpy as np
import pytest
import watermark
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cinema import credentials
from cinema.cli import main
from cinema.credentials import read_credentials, sign
from cinema.errors import UserError
from cinema.media import film_writer
from cinema.policy import check_names, concerns
from cinema.provenance import (
    BAND,
    FOUND,
    NEEDED,
    PAYLOADS,
    PRIME,
    SENT,
    SHARES,
    TILE,
    Watermark,
    chance,
    correlate,
    detect,
    listen,
    spell,
    understand,
    waves,
    whiten,
)
from cinema.story import Character, Shot, Story
from cinema.writer import write_story

RUN = 0xC1AE7A5


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody's own key is used, or made."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    for name in ("KEY", "CERTIFICATE"):
        monkeypatch.delenv(f"CINEMA_SIGNING_{name}", raising=False)
    monkeypatch.delenv("CINEMA_POLICY", raising=False)
    return folder


@pytest.fixture(scope="module")
def frames() -> list[Image.Image]:
    return watermark.toy_film("tests", shots=2, frames=6)


@pytest.fixture(scope="module")
def marked(frames: list[Image.Image]) -> list[Image.Image]:
    return [Watermark(RUN).embed(frame) for frame in frames]


@pytest.fixture
def film(marked: list[Image.Image], tmp_path: Path) -> Path:
    path = tmp_path / "film.mp4"
    with film_writer(path, *marked[0].size, 8) as add:
        for frame in marked:
            add(frame)
    return path


# --- the mark ---


def test_a_code_word_is_a_cubic_and_any_four_letters_are_enough() -> None:
    letters = spell(RUN)
    assert len(letters) == SENT
    # Fourth differences of a cubic vanish.
    fourth = [sum(c * letters[i + j] for j, c in enumerate((1, -4, 6, -4, 1))) % PRIME for i in range(SENT - 4)]
    assert fourth == [0, 0]
    assert sum(letter * PRIME**i for i, letter in enumerate(letters[:NEEDED])) == RUN


@settings(max_examples=40, deadline=None)
@given(st.integers(0, PAYLOADS - 1), st.sets(st.integers(0, SENT - 1), max_size=2), st.randoms())
def test_two_letters_misheard_are_mended(payload: int, wrong: set[int], rng: random.Random) -> None:
    evidence = np.zeros((SENT, PRIME))
    for i, letter in enumerate(spell(payload)):
        evidence[i, letter] = 6
        if i in wrong:
            evidence[i, (letter + rng.randrange(1, PRIME)) % PRIME] = 6.5
    assert understand(evidence)[0] == payload


def test_the_pattern_has_its_waves_and_no_others() -> None:
    tile = Watermark(RUN).tile
    power = np.abs(np.fft.fft2(tile)) ** 2
    y, x = np.meshgrid(*[np.fft.fftfreq(TILE, 1 / TILE)] * 2, indexing="ij")
    radius = np.hypot(y, x)
    inside = (BAND[0] <= radius) & (radius <= BAND[1]) & (x != 0)
    assert power[~inside].max() < 1e-6 * power[inside].min()
    assert np.isclose(tile.std(), 1, atol=1e-5) and abs(tile.mean()) < 1e-6
    assert {letter: int((waves().letter == letter).sum()) for letter in (0, 1)} == {0: 284, 1: 71}


def test_correlation_is_the_sum_of_cosines() -> None:
    """The FFT against the equation, at a few offsets."""
    own = waves()
    heard = np.exp(2j * np.pi * np.random.default_rng(0).random(len(own.k)))
    for letter in (0, 3):
        mine, z = own.letter == letter, correlate(heard, letter)
        for y, x in ((0, 0), (5, 77), (127, 1)):
            angles = np.angle(heard[mine]) - own.phase[mine] + 2 * np.pi / TILE * own.k[mine] @ [y, x]
            assert np.isclose(z[y, x], np.cos(angles).sum() / np.sqrt(mine.sum() / 2), atol=1e-3)


def test_where_there_is_no_mark_the_peak_is_as_stated() -> None:
    """Random phases, a thousand times: the share of peaks below each probability is that probability."""
    rng, own = np.random.default_rng(0), waves()
    peaks = [correlate(np.exp(2j * np.pi * rng.random(len(own.k)))).max() for _ in range(1000)]
    stated = np.array([chance(float(peak), TILE**2) for peak in peaks])
    for level in (0.5, 0.1, 0.05):
        spread = 3 * np.sqrt(level * (1 - level) / 1000)
        assert 0.6 * level - spread < (stated <= level).mean() < level + spread
    assert chance(40.0) == 0 and chance(-5.0) == 1 and np.isclose(chance(0.0, 1), 0.5)


def test_a_mark_costs_40_decibels_and_leaves_colours(frames: list[Image.Image], marked: list[Image.Image]) -> None:
    for before, after in zip(frames, marked, strict=True):
        psnr, ssim = watermark.quality(before, after)
        assert 40 < psnr < 42 and ssim > 0.93
        a, b = (np.asarray(image, int) for image in (before, after))
        inside = ((a > 12) & (a < 243)).all(-1)
        assert np.ptp((b - a)[inside], axis=-1).max() <= 1  # luma alone, but for rounding
        assert np.abs(b - a).max() <= 30


@pytest.mark.parametrize("name", watermark.ON_FRAMES)
def test_one_frame_is_enough(name: str, marked: list[Image.Image]) -> None:
    heard = detect([watermark.ON_FRAMES[name](marked[3], random.Random(0))])
    assert heard.found and heard.payload == RUN and heard.chance < FOUND


@pytest.mark.parametrize("name", [name for name in watermark.ON_FILMS if "one frame" not in name])
def test_frames_of_a_film_add_up(name: str, marked: list[Image.Image]) -> None:
    heard = detect(watermark.ON_FILMS[name](marked))
    read = {RUN, None} if "33" in name else {RUN}  # from twelve frames so coarse the payload may not be made out
    assert heard.found and heard.payload in read


def test_place_and_size_are_found(marked: list[Image.Image]) -> None:
    part = marked[3].crop((20, 16, 20 + 200, 16 + 100))
    heard = detect([part])
    assert heard.offset == pytest.approx((16, 20), abs=1) and heard.share == pytest.approx(100 / 128, rel=0.012)
    best = listen(whiten(part), float(SHARES[np.argmin(abs(SHARES - 100 / 128))]))
    assert float(correlate(best).max()) == pytest.approx(heard.peak, rel=0.2)


@pytest.mark.parametrize(
    "size", [(256, 128), (128, 64), (800, 400), (320, 240), (90, 160), (1, 1), (3, 500), (4000, 2)]
)
def test_frames_of_any_size_can_be_marked_and_looked_at(size: tuple[int, int]) -> None:
    image = watermark.toy_film("sizes", 1, 2)[0].resize(size)
    after = Watermark(RUN).embed(image)
    assert after.size == size and not detect([image]).found
    assert detect([after]).found == (min(size) >= 64)


def test_unmarked_frames_are_not_found(frames: list[Image.Image]) -> None:
    stills = [watermark.toy_film(f"null {i}", 1, 2)[0] for i in range(40)]
    assert not [image for image in stills if detect([image]).found]
    assert not detect(frames).found  # nor does the same picture many times pile up
    assert not detect([frames[0]] * 50).found
    for flat in (0, 255):
        assert detect([Image.new("RGB", (256, 128), (flat,) * 3)]).chance == 1


def test_a_mark_of_another_seed_is_not_found(frames: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    own = waves()
    phase = np.random.default_rng(1).permutation(own.phase)
    other = type(own)(own.k, phase, own.letter)
    with monkeypatch.context() as patch:
        patch.setattr("cinema.provenance.waves", lambda: other)
        stranger = Watermark(RUN).embed(frames[0])
        assert detect([stranger]).found
    assert not detect([stranger]).found


# --- credentials ---


def signed(film: Path) -> Path:
    sign(film, "a film", {"story_sha256": "0" * 64})
    return film


def test_a_signed_film_is_valid_and_the_same_bytes_and_plays(film: Path, tmp_path: Path) -> None:
    plain = film.read_bytes()
    again = Path(shutil.copy(film, tmp_path / "again.mp4"))
    assert read_credentials(film).credentials == "absent"
    assert signed(film).read_bytes() == signed(again).read_bytes() != plain
    found = read_credentials(film)
    assert found.credentials == "valid" and found.told == {"story_sha256": "0" * 64}
    assert found.signer == "development key of cinema (self-signed, proves no identity)"
    data = film.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    with av.open(str(film)) as container:
        assert len([*container.decode(video=0)]) == 12
    with c2pa.Reader(str(film)) as reader:
        (manifest,) = json.loads(reader.json())["manifests"].values()
    (action,) = manifest["assertions"][1]["data"]["actions"]
    assert action["action"] == "c2pa.created" and action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert manifest["claim_generator_info"][0]["name"] == "cinema"


def test_the_development_key_is_private_and_made_once(film: Path, home: Path) -> None:
    signed(film)
    path = home / "cinema" / "development.pem"
    assert path.stat().st_mode & 0o077 == 0
    key = path.read_bytes()
    signed(film)
    assert path.read_bytes() == key
    path.unlink()  # another machine: intact, but whose is it?
    found = read_credentials(film)
    assert found.credentials == "broken" and "untrusted" in str(found.reason) and found.signer is None


def test_who_forges_a_manifest_has_to_sign_it(film: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same words, the same name on the certificate, another key."""
    signed(film)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "forger"))
    forged = signed(Path(shutil.copy(film, tmp_path / "forged.mp4")))
    assert read_credentials(forged).credentials == "valid"  # at home
    monkeypatch.undo()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "elsewhere"))
    sign(Path(shutil.copy(film, tmp_path / "mine.mp4")), "mine", {})
    assert read_credentials(forged).credentials == "broken"
    assert read_credentials(film).credentials == "broken"


@pytest.mark.parametrize("place", [b"story_sha256", b"trainedAlgorithmicMedia", b"c2pa.signature", b"moov", 0.7, 0.9])
def test_a_changed_byte_breaks_them(place: bytes | float, film: Path) -> None:
    data = bytearray(signed(film).read_bytes())
    data[data.index(place) + len(place) + 9 if isinstance(place, bytes) else int(place * len(data))] ^= 1
    film.write_bytes(data)
    assert read_credentials(film).credentials == "broken"


def test_credentials_of_another_film_do_not_fit(film: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.mp4"
    with film_writer(other, 256, 128, 8) as add:
        for _ in range(12):
            add(Image.new("RGB", (256, 128), "red"))
    uuid = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")  # C2PA's box, after the first
    data, plain = signed(film).read_bytes(), other.read_bytes()
    start = data.index(uuid) - 8
    box = data[start : start + int.from_bytes(data[start : start + 4])]
    other.write_bytes(plain[:start] + box + plain[start:])
    assert read_credentials(other).credentials == "broken"


def test_a_users_own_key_signs_and_is_trusted_when_named(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    certificate = certify(key, "A Studio", pem)
    (tmp_path / "key.pem").write_bytes(private)
    (tmp_path / "certificate.pem").write_bytes(certificate)
    monkeypatch.setenv("CINEMA_SIGNING_KEY", str(tmp_path / "key.pem"))
    with pytest.raises(UserError, match="CINEMA_SIGNING_CERTIFICATE"):
        signed(film)
    monkeypatch.setenv("CINEMA_SIGNING_CERTIFICATE", str(tmp_path / "certificate.pem"))
    again = Path(shutil.copy(film, tmp_path / "again.mp4"))
    assert signed(film).read_bytes() == signed(again).read_bytes()
    assert read_credentials(film).credentials == "broken"
    found = read_credentials(film, [tmp_path / "certificate.pem"])
    assert found.credentials == "valid" and found.signer == "A Studio (A Studio)"
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(UserError, match="no key that can sign"):
        signed(film)


def certify(key: ec.EllipticCurvePrivateKey, name: str, pem: serialization.Encoding) -> bytes:
    from cryptography.hazmat.primitives import hashes

    model = x509.load_pem_x509_certificate(credentials._new_key())  # as the development key's, but for name and key
    oid = x509.NameOID
    own = x509.Name([x509.NameAttribute(kind, name) for kind in (oid.COMMON_NAME, oid.ORGANIZATION_NAME)])
    begin, end, public = model.not_valid_before_utc, model.not_valid_after_utc, key.public_key()
    new = x509.CertificateBuilder(own, own, public, x509.random_serial_number(), begin, end)
    for extension in [*model.extensions][:3]:
        new = new.add_extension(extension.value, extension.critical)
    new = new.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), False)
    return new.sign(key, hashes.SHA256()).public_bytes(pem)


# --- the command ---


def told(capsys: pytest.CaptureFixture[str], *files: Path) -> tuple[int, list[dict]]:
    code = main(["verify", *map(str, files)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, [json.loads(line) for line in out.splitlines()]


def test_verify_says_what_it_found(film: Path, frames: list[Image.Image], tmp_path: Path, capsys) -> None:
    signed(film)
    frames[0].save(plain := tmp_path / "plain.png")
    watermark.crop(watermark.film([Watermark(RUN).embed(frames[0])] * 4, 18)[2], 0.2).save(
        shot := tmp_path / "shot.jpg"
    )
    code, (verdict,) = told(capsys, film)
    assert code == 0 and verdict["watermark"] and verdict["payload"] == f"{RUN:07x}"
    assert verdict["credentials"] == "valid" and verdict["false_positive_probability"] < FOUND
    code, (verdict,) = told(capsys, shot)
    assert code == 0 and verdict["payload"] == f"{RUN:07x}" and verdict["credentials"] == "absent"
    code, (verdict,) = told(capsys, plain)
    assert code == 1 and not verdict["watermark"] and verdict["payload"] is None
    assert FOUND < verdict["false_positive_probability"] <= 1
    code, verdicts = told(capsys, film, plain, tmp_path / "gone.mp4")
    assert (
        code == 2
        and [v["watermark"] for v in verdicts] == [True, False, False]
        and "no such file" in verdicts[2]["error"]
    )


@pytest.mark.parametrize(
    "name", ["zeros.mp4", "text.mp4", "empty.png", "noise.jpg", "folder", "no-index.mp4", "no.webm"]
)
def test_what_is_no_media_is_unreadable(name: str, film: Path, tmp_path: Path, capsys) -> None:
    path, data = tmp_path / name, signed(film).read_bytes()
    contents = {
        "zeros.mp4": bytes(10**6),
        "text.mp4": b"no film",
        "empty.png": b"",
        "noise.jpg": np.random.default_rng(0).bytes(10_000),
        "no-index.mp4": data[:200],
        "no.webm": b"\x1aE\xdf\xa3" + bytes(100),
    }
    path.mkdir() if name == "folder" else path.write_bytes(contents[name])
    code, (verdict,) = told(capsys, path)
    assert code == 2 and not verdict["watermark"] and verdict["credentials"] != "valid" and verdict["error"]


def test_a_truncated_film_is_looked_at_as_far_as_it_goes(film: Path, capsys) -> None:
    data = signed(film).read_bytes()
    film.write_bytes(data[: len(data) * 3 // 4])
    code, (verdict,) = told(capsys, film)
    assert code == 0 and verdict["watermark"] and verdict["credentials"] == "broken"


@pytest.mark.parametrize("ending", [".mp4", ".webm"])
def test_a_film_of_one_frame(ending: str, marked: list[Image.Image], tmp_path: Path, capsys) -> None:
    path = (tmp_path / "one").with_suffix(ending)
    with film_writer(path, *marked[0].size, 8) as add:
        add(marked[0])
    code, (verdict,) = told(capsys, path)
    assert code == 0 and verdict["payload"] == f"{RUN:07x}" and verdict["credentials"] == "absent"


# --- the policy ---


def story(caption: str = "a wall. <ada> left.", *cast: str) -> Story:
    return Story(title="t", cast=[Character(tag=tag) for tag in ("<ada>", *cast)], shots=[Shot(caption=caption)])


@pytest.mark.parametrize(
    "text", ["Taylor Swift sings.", "TAYLOR  SWIFT", "tâylor-swift", "<taylor_swift> left", "<taylorswift>"]
)
def test_real_persons_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="Taylor Swift is a real person"):
        check_names(text)


@pytest.mark.parametrize("text", ["A swift tailor.", "Taylor met a swift", "Ada hops.", "mataylor swiftly"])
def test_other_names_are_not(text: str) -> None:
    assert check_names(text) == []


def test_a_users_policy_adds_names_and_may_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("names: flag\nreal_persons: [Ada Lovelace]\n")
    monkeypatch.setenv("CINEMA_POLICY", str(tmp_path / "mine.yaml"))
    assert [line.split(" is ")[0] for line in check_names("Ada Lovelace and Tom Hanks")] == [
        "Tom Hanks",
        "Ada Lovelace",
    ]
    assert "Tom Hanks is a real person" in write_story("Ada jumps. Tom Hanks waves.").understood[0]
    for text, says in (
        ("names: maybe", "'refuse' or 'flag'"),
        ("", "not a policy; it needs names"),
        (None, "no such file"),
    ):
        (tmp_path / "mine.yaml").write_text(text) if text is not None else (tmp_path / "mine.yaml").unlink()
        with pytest.raises(UserError, match=says):
            check_names("Ada")


def test_stories_are_checked_whole() -> None:
    assert concerns(story()) == []
    assert concerns(story("a wall. <ada> left.", "<bo>")) == ["<bo> is in the cast and in no shot"]
    with pytest.raises(UserError, match="Tom Hanks"):
        concerns(story("Tom Hanks sits. <ada> left."))
    with pytest.raises(UserError, match="Tom Hanks"):
        write_story("Tom Hanks jumps.")
