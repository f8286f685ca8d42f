#!/usr/bin/python3
"""Lists the restore points of a Virtward repository in a directory, and restores a disk to a raw file.

Written from docs/format.md alone, as a proof that the page is enough and as a last resort: it shares no code with
Virtward. Needs Debian's python3-cryptography, python3-argon2, python3-zstandard and python3-lz4.

    virtward_reader.py --password-file FILE REPOSITORY list
    virtward_reader.py --key-file FILE REPOSITORY restore POINT DISK OUTPUT
"""

import argparse
import json
import os
import re
import struct
import sys

import argon2.low_level
import lz4.block
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

import blake3

TAG = 16
KINDS = {"config": 1, "keys": 2, "points": 3}
CIPHERS = {"aes-256-gcm": 1, "chacha20-poly1305": 2}
CLASS_ID, CLASS_META, CLASS_DATA = 1, 2, 3
SYMMETRIC, PRIVATE = 1, 3
PACK_DATA, PACK_META = 1, 2
FANOUT = 256
PLAIN_MAX = 4 << 20
ENTRIES_PER_BLOCK = 512
LINES_PER_PIECE = 16384


class Bad(Exception):
    """What is wrong with an object, a key or a request."""


def check(condition, what):
    if not condition:
        raise Bad(what)


# Cryptography (section 2)


def h16(data):
    return blake3.digest(data)[:16]


def derive(purpose, key, *info):
    return blake3.derive_key("virtward repository 1 " + purpose, key + b"".join(info))


def unseal(cipher, key, counter, aad, sealed, what):
    check(cipher in (1, 2), f"{what}: unknown cipher {cipher}")
    nonce = struct.pack("<Q4x", counter)
    try:
        return (AESGCM if cipher == 1 else ChaCha20Poly1305)(key).decrypt(nonce, sealed, aad)
    except InvalidTag:
        raise Bad(f"{what} fails authentication") from None


class Envelope:
    """Section 3."""

    def __init__(self, name, data):
        kind = KINDS[name.split("/")[0]]
        check(len(data) >= 52 and data[:8] == b"VIRTWARD", f"{name} is no envelope")
        check(data[8] == kind and data[9] == 1 and data[10:12] == b"\0\0", f"{name}: unknown kind or version")
        header_bytes, body_bytes = struct.unpack_from("<II", data, 12)
        body_at = 20 + header_bytes
        check(header_bytes <= 65536 and len(data) == body_at + body_bytes + 32, f"{name} has the wrong length")
        check(blake3.digest(data[:-32]) == data[-32:], f"{name} is damaged")
        self.name, self.aad, self.body = name, data[:body_at], data[body_at:-32]
        self.header = json.loads(data[20:body_at])

    def bytes(self, field, length):
        value = bytes.fromhex(self.header[field])
        check(len(value) == length, f"{self.name}: {field} has the wrong length")
        return value

    def open(self, key):
        cipher = CIPHERS.get(self.header["cipher"])
        return unseal(cipher, key, 0, self.aad, self.body, self.name)


def check_features(header, name):
    check(header["format"] == 1, f"{name}: format {header['format']} is newer than this reader")
    check(not header["features"], f"{name}: needs {', '.join(header['features'])}, which this reader does not know")


# Keys (section 5)


def password_material(password, slot):
    cost = slot.header["argon2id"]
    memory, passes, lanes = cost["memory_kib"], cost["passes"], cost["lanes"]
    check(memory <= 1 << 20 and passes <= 32 and lanes <= 16, f"{slot.name}: the cost of its password is too high")
    return argon2.low_level.hash_secret_raw(
        password, slot.bytes("salt", 32), time_cost=passes, memory_cost=memory, parallelism=lanes, hash_len=32,
        type=argon2.low_level.Type.ID, version=0x13)


class Keys:
    def __init__(self, bundle):
        check(len(bundle) >= 2 and bundle[0] == 1 and len(bundle) == 2 + 40 * bundle[1], "the key bundle is malformed")
        self.keys, self.id_key = {}, None
        for at in range(2, len(bundle), 40):
            kind, form, generation, key = struct.unpack_from("<BB2xI32s", bundle, at)
            if kind == CLASS_ID:
                self.id_key = key
            self.keys[kind, form, generation] = key
        check(self.id_key is not None, "the key bundle has no id key")

    def get(self, kind, form, generation, what):
        key = self.keys.get((kind, form, generation))
        check(key is not None, f"{what}: this key slot lacks a key for it (class {kind}, generation {generation})")
        return key


class Repository:
    def __init__(self, path, password=None, key_file=None):
        self.path = path
        config = Envelope("config", self.read("config"))
        check_features(config.header, "config")
        self.id = config.bytes("repository", 16)
        self.keys = self.unlock(password, key_file)
        self.page_key = derive("page ids", self.keys.id_key, self.id)
        self.chunk_key = derive("chunk ids", self.keys.id_key, self.id)
        self.places = None
        self.pack_keys = {}

    def read(self, name):
        with open(os.path.join(self.path, name), "rb") as file:
            return file.read()

    def names(self, directory):
        path = os.path.join(self.path, directory)
        found = os.listdir(path) if os.path.isdir(path) else []
        return sorted(name for name in found if re.fullmatch("[0-9a-f]{32}", name))

    def unlock(self, password, key_file):
        refusals = []
        for name in self.names("keys"):
            try:
                slot = Envelope(f"keys/{name}", self.read(f"keys/{name}"))
                check_features(slot.header, slot.name)
                if slot.header["kind"] == "password" and password is not None:
                    material = password_material(password, slot)
                elif slot.header["kind"] == "key-file" and key_file is not None:
                    material = blake3.digest(key_file)
                else:
                    continue
                salt, slot_id = slot.bytes("salt", 32), slot.bytes("slot", 16)
                return Keys(slot.open(derive("key slot", material, salt, self.id, slot_id)))
            except Bad as error:
                refusals.append(str(error))
        raise Bad("no key slot opens with this secret: " + "; ".join(refusals or ["none is of its kind"]))

    # Restore points (section 9)

    def points(self):
        points = [self.point(name) for name in self.names("points")]
        return sorted(points, key=lambda point: point["taken"])

    def point(self, point_id):
        envelope = Envelope(f"points/{point_id}", self.read(f"points/{point_id}"))
        header, name = envelope.header, envelope.name
        check(envelope.bytes("repository", 16) == self.id, f"{name} is of another repository")
        check(header["name"] == name, f"{name} was {header['name']} when it was written")
        meta = self.keys.get(CLASS_META, SYMMETRIC, header["key_generation"], name)
        body = envelope.open(derive("sealed object", meta, envelope.bytes("salt", 32), self.id))
        return json.loads(body)["point"]

    # Index (section 7)

    def load_index(self):
        segments, replaced = [], set()
        for name in self.names("index"):
            data = self.read(f"index/{name}")
            name = f"index/{name}"
            check(len(data) >= 224 and data[:8] == b"VWINDEX\n", f"{name} is no index segment")
            check(data[8:10] == b"\1\0", f"{name}: unknown version")
            check(data[16:32] == self.id and data[32:48].hex() == name[6:], f"{name} is another object")
            check(blake3.digest(data[:-32]) == data[-32:], f"{name} is damaged")
            _, _, gone, _, _ = struct.unpack_from("<QIIII", data, 72)
            packs = struct.unpack_from("<I", data, 80)[0]
            at = 192 + 384 * packs
            replaced.update(data[at + 16 * i:at + 16 * (i + 1)].hex() for i in range(gone))
            segments.append((name, data))
        self.places = {}
        for name, data in segments:
            if name[6:] not in replaced:
                self.load_segment(name, data)

    def load_segment(self, name, data):
        entries, packs, gone, per_block, generation = struct.unpack_from("<QIIII", data, 72)
        check(per_block == ENTRIES_PER_BLOCK, f"{name}: blocks of {per_block} entries")
        tails = [data[192 + 384 * i:192 + 384 * (i + 1)] for i in range(packs)]
        fences_at = 192 + 384 * packs + 16 * gone
        blocks = -(-entries // per_block)
        meta = self.keys.get(CLASS_META, SYMMETRIC, generation, name)
        key = derive("index segment", meta, data[96:128], self.id)
        aad = blake3.digest(data[:fences_at])
        lines = struct.unpack_from("<I", data, 128)[0]
        # The filter only says sooner that something is not listed; it is skipped.
        at = fences_at + 8 * blocks + TAG + 64 * lines + TAG * -(-lines // LINES_PER_PIECE)
        for number in range(blocks):
            count = min(per_block, entries - number * per_block)
            sealed = data[at:at + 48 * count + TAG]
            at += len(sealed)
            block = unseal(data[10], key, number, aad, sealed, f"{name} block {number}")
            for entry in range(0, len(block), 48):
                chunk, pack, offset, length, word = struct.unpack_from("<32sIIII", block, entry)
                check(pack < packs, f"{name}: an entry names no pack")
                self.places.setdefault(chunk, []).append((tails[pack], offset, length, word))

    # Packs (section 6)

    def pack_key(self, header, name):
        if header not in self.pack_keys:
            check(header[:8] == b"VWPACK\r\n" and header[8:10] == b"\1\0", f"{name}: unknown kind of pack")
            check(h16(header[:240]) == header[240:] and header[16:32] == self.id, f"{name}: its header is damaged")
            kind = {PACK_DATA: CLASS_DATA, PACK_META: CLASS_META}.get(header[10])
            wrapping, generation = struct.unpack_from("<II", header, 72)
            if wrapping == 1:
                key = self.keys.get(kind, SYMMETRIC, generation, name)
                wrapper = derive("pack key under symmetric key", key, header[80:112])
            else:
                check(wrapping == 2, f"{name}: unknown wrapping {wrapping}")
                private = X25519PrivateKey.from_private_bytes(self.keys.get(kind, PRIVATE, generation, name))
                shared = private.exchange(X25519PublicKey.from_public_bytes(header[80:112]))
                public = public_bytes(private)
                wrapper = derive("pack key under x25519", shared, header[80:112], public)
            self.pack_keys[header] = unseal(header[11], wrapper, 0, header[:72], header[112:160], name)
        return self.pack_keys[header]

    def record(self, pack_class, wanted):
        """The plaintext with an id, from any place that has it."""
        if self.places is None:
            self.load_index()
        faults = []
        for place in self.places.get(wanted, ()):
            try:
                return self.record_at(pack_class, wanted, *place)
            except (Bad, OSError) as error:
                faults.append(str(error))
        raise Bad(f"{wanted.hex()}: " + ("; ".join(faults) or "not in the index"))

    def record_at(self, pack_class, wanted, tail, offset, length, word):
        header = tail[:256]
        pack = header[32:48].hex()
        name = f"{'data' if pack_class == PACK_DATA else 'meta'}/{pack[:2]}/{pack}"
        check(header[10] == pack_class, f"{name} is of the other class")
        key = self.pack_key(header, name)
        plain_bytes, encoding = word & 0xFFFFFF, word >> 24
        check(plain_bytes <= PLAIN_MAX and length <= plain_bytes + TAG, f"{name}: a record is too long")
        with open(os.path.join(self.path, name), "rb") as file:
            file.seek(offset)
            sealed = file.read(length)
        aad = self.id + struct.pack("<HBB", 1, pack_class, 0) + wanted + struct.pack("<I", word)
        encoded = unseal(header[11], key, offset, aad, sealed, f"{name} record at {offset}")
        plain = decode(encoding, encoded, plain_bytes, name)
        id_key = self.chunk_key if pack_class == PACK_DATA else self.page_key
        check(blake3.keyed(id_key, plain) == wanted, f"{name} record at {offset} is not what it should be")
        return plain

    # Disks (section 8)

    def data_chunks(self, disk):
        """Number and plaintext of each chunk that is not zero, in order."""
        chunks = -(-disk["size_bytes"] // disk["chunk_bytes"])
        level = 0
        while FANOUT ** (level + 1) < chunks:
            level += 1
        if disk["root"]:
            for index, layers in self.leaves(bytes.fromhex(disk["root"]), level, 0):
                if index < chunks:
                    room = min(disk["chunk_bytes"], disk["size_bytes"] - index * disk["chunk_bytes"])
                    plain = self.record(PACK_DATA, layers[0])[:room]
                    for overlay in layers[1:]:
                        plain = lay_over(plain.ljust(room, b"\0"), self.record(PACK_DATA, overlay))
                    yield index, plain

    def leaves(self, page_id, level, number):
        """Number of each data chunk below page `number` of a level, with its id and the ids of its overlays."""
        page = self.record(PACK_META, page_id)
        version = page[4]
        check(page[:4] == b"VWPG" and version in ((1, 2) if level == 0 else (1,)), f"page {page_id.hex()} is newer")
        check(page[5] == level, f"page {page_id.hex()} is of another level")
        count = struct.unpack_from("<H", page, 6)[0]
        check(count <= FANOUT, f"page {page_id.hex()} has too many entries")
        bitmap_bytes = -(-count // 8)
        at, width = 8 + bitmap_bytes, 32 if level == 0 else 40
        for entry in range(count):
            if page[8 + entry // 8] >> entry % 8 & 1:
                below, index = page[at:at + 32], FANOUT * number + entry
                at += width
                if level == 0:
                    layers = [below]
                    if version == 2:
                        end = at + 1 + 32 * page[at]
                        layers += [page[place:place + 32] for place in range(at + 1, end, 32)]
                        at = end
                    yield index, layers
                else:
                    yield from self.leaves(below, level - 1, index)

    def restore(self, disk, output):
        """Writes a disk to a new file; the bytes that are not zero."""
        size, chunk_bytes, written = disk["size_bytes"], disk["chunk_bytes"], 0
        with open(output, "xb") as file:
            file.truncate(size)
            for index, plain in self.data_chunks(disk):
                place = index * chunk_bytes
                plain = plain[:min(chunk_bytes, size - place)]
                file.seek(place)
                file.write(plain)
                written += len(plain)
        return written


def lay_over(chunk, overlay):
    """The chunk with the overlay's parts written over it; what lies beyond its end is left out."""
    check(overlay[:5] == b"VWOV\1", "an overlay of another format")
    count, = struct.unpack_from("<H", overlay, 5)
    chunk, room, at = bytearray(chunk), len(chunk), 7 + 8 * count
    for part in range(count):
        offset, length = struct.unpack_from("<II", overlay, 7 + 8 * part)
        check(at + length <= len(overlay), "an overlay ends too early")
        if offset < room:
            end = min(offset + length, room)
            chunk[offset:end] = overlay[at:at + end - offset]
        at += length
    check(at == len(overlay), "an overlay is longer than its parts")
    return bytes(chunk)


def public_bytes(private):
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    return private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def decode(encoding, encoded, plain_bytes, name):
    try:
        if encoding == 0:
            plain = encoded
        elif encoding == 1:
            plain = lz4.block.decompress(encoded, uncompressed_size=plain_bytes)
        elif encoding == 2:
            plain = zstandard.ZstdDecompressor().decompress(encoded, max_output_size=plain_bytes)
        else:
            raise Bad(f"{name}: unknown encoding {encoding}")
    except (lz4.block.LZ4BlockError, zstandard.ZstdError) as error:
        raise Bad(f"{name}: {error}") from error
    check(len(plain) == plain_bytes, f"{name}: a record has the wrong length")
    return plain


def find(repository, prefix):
    found = [name for name in repository.names("points") if name.startswith(prefix)]
    check(len(found) == 1, f"{prefix}: {'no restore point' if not found else 'several restore points'} of that name")
    return repository.point(found[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    secret = parser.add_mutually_exclusive_group(required=True)
    secret.add_argument("--password-file", metavar="FILE", help="a newline at its end is not part of the password")
    secret.add_argument("--key-file", metavar="FILE")
    parser.add_argument("repository", help="directory")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="restore points, oldest first, a JSON object per line")
    restore = commands.add_parser("restore", help="write a disk to a new raw file")
    restore.add_argument("point", help="id of the restore point, or its first digits")
    restore.add_argument("disk", help="target of the disk, such as vda")
    restore.add_argument("output")
    options = parser.parse_args()
    with open(options.password_file or options.key_file, "rb") as file:
        content = file.read()
    if options.password_file:
        repository = Repository(options.repository, password=content.removesuffix(b"\n"))
    else:
        repository = Repository(options.repository, key_file=content)
    if options.command == "list":
        for point in repository.points():
            print(json.dumps(point))
        return
    point = find(repository, options.point)
    disks = [disk for disk in point["disks"] if disk["target"] == options.disk]
    check(disks, f"{options.disk}: this restore point has {', '.join(disk['target'] for disk in point['disks'])}")
    written = repository.restore(disks[0], options.output)
    print(f"{options.output}: {disks[0]['size_bytes']} bytes, of which {written} are data", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (Bad, OSError, KeyError, ValueError, struct.error) as error:
        sys.exit(f"virtward_reader: {type(error).__name__}: {error}" if not isinstance(error, Bad) else f"virtward_reader: {error}")
