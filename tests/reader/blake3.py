"""BLAKE3 (hash, keyed hash, derive_key) with 32 bytes of output, in plain Python.

Debian has no package of it. All 1024-byte chunks of an input are compressed side by side: each word of the state is one
large integer with a lane of 64 bits per chunk, whose upper half is always zero, so that additions and rotations of all
lanes are one operation on large integers. That makes it fast enough to restore disks with.
"""

from array import array
import sys

OUT_BYTES = 32
_BLOCK = 64
_CHUNK = 1024
_CHUNK_START, _CHUNK_END, _PARENT, _ROOT = 1, 2, 4, 8
_KEYED_HASH, _DERIVE_KEY_CONTEXT, _DERIVE_KEY_MATERIAL = 16, 32, 64
_IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
_PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
_MIXED = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
          (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def _schedule():
    order, rounds = list(range(16)), []
    for _ in range(7):
        rounds.append(tuple(order))
        order = [order[i] for i in _PERMUTATION]
    return rounds


_ROUNDS = _schedule()


def _ones(lanes):
    """1 in every lane."""
    return int.from_bytes(b"\1\0\0\0\0\0\0\0" * lanes, "little")


def _pack(words):
    """One number per lane."""
    return int.from_bytes(_little(array("Q", words)), "little")


def _little(numbers):
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _unpack(lanes, packed):
    numbers = array("Q", packed.to_bytes(8 * lanes, "little"))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _compress(ones, cv, block, counter, length, flags):
    """The first half of the output. `cv`, `block` and `counter` are packed, the rest is the same in all lanes."""
    mask = ones * 0xFFFFFFFF
    low, high = counter & mask, (counter >> 32) & mask
    v = list(cv) + [ones * word for word in _IV[:4]] + [low, high, ones * length, ones * flags]
    for order in _ROUNDS:
        for step, (a, b, c, d) in enumerate(_MIXED):
            va, vb, vc, vd = v[a], v[b], v[c], v[d]
            va = (va + vb + block[order[2 * step]]) & mask
            vd ^= va
            vd = (vd >> 16 | vd << 16) & mask
            vc = (vc + vd) & mask
            vb ^= vc
            vb = (vb >> 12 | vb << 20) & mask
            va = (va + vb + block[order[2 * step + 1]]) & mask
            vd ^= va
            vd = (vd >> 8 | vd << 24) & mask
            vc = (vc + vd) & mask
            vb ^= vc
            v[a], v[b], v[c], v[d] = va, (vb >> 7 | vb << 25) & mask, vc, vd
    return [v[i] ^ v[i + 8] for i in range(8)]


def _words(data):
    words = array("I", data)
    if sys.byteorder == "big":
        words.byteswap()
    return words


def _full_chunks(data, lanes, key, flags):
    """Chaining values of `lanes` whole chunks, as packed words."""
    ones, words = _ones(lanes), _words(data)
    counter = _pack(range(lanes))
    cv = [ones * word for word in key]
    blocks = _CHUNK // _BLOCK
    for number in range(blocks):
        block = [_pack(words[number * 16 + i::_CHUNK // 4]) for i in range(16)]
        ends = (_CHUNK_START if number == 0 else 0) | (_CHUNK_END if number == blocks - 1 else 0)
        cv = _compress(ones, cv, block, counter, _BLOCK, flags | ends)
    return cv


def _last_chunk(data, index, key, flags):
    """Chaining value of the last chunk, which may be short, and is the root if it is the only one."""
    cv = list(key)
    blocks = max(1, -(-len(data) // _BLOCK))
    for number in range(blocks):
        block = data[number * _BLOCK:(number + 1) * _BLOCK]
        ends = _CHUNK_START if number == 0 else 0
        if number == blocks - 1:
            ends |= _CHUNK_END | (_ROOT if index == 0 else 0)
        cv = _compress(1, cv, _words(block.ljust(_BLOCK, b"\0")), index, len(block), flags | ends)
    return cv


def _hash(data, key, flags):
    data = bytes(data)
    whole = max(0, (len(data) - 1) // _CHUNK)
    nodes = [array("Q") for _ in range(8)]
    if whole:
        packed = _full_chunks(data[:whole * _CHUNK], whole, key, flags)
        nodes = [_unpack(whole, word) for word in packed]
    for node, word in zip(nodes, _last_chunk(data[whole * _CHUNK:], whole, key, flags)):
        node.append(word)
    # Neighbours are joined level by level; the odd one out moves up.
    while len(nodes[0]) > 1:
        count = len(nodes[0])
        pairs = count // 2
        ones = _ones(pairs)
        block = [_pack(node[side:2 * pairs:2]) for side in (0, 1) for node in nodes]
        root = _ROOT if count == 2 else 0
        joined = _compress(ones, [ones * word for word in key], block, 0, _BLOCK, flags | _PARENT | root)
        nodes = [_unpack(pairs, word) + node[2 * pairs:] for word, node in zip(joined, nodes)]
    return b"".join(node[0].to_bytes(4, "little") for node in nodes)


def digest(data):
    """BLAKE3 of the data."""
    return _hash(data, _IV, 0)


def keyed(key, data):
    """BLAKE3 of the data under a key of 32 bytes."""
    return _hash(data, _words(key), _KEYED_HASH)


def derive_key(context, material):
    """A key derived from key material, for the use that the context string names."""
    context_key = _hash(context.encode(), _IV, _DERIVE_KEY_CONTEXT)
    return _hash(material, _words(context_key), _DERIVE_KEY_MATERIAL)
