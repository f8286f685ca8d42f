"""Makes restic snapshots of directories that restic has stored already: points_restic.py BEGIN

A `restic backup` takes half a second at least, most of it for the password; ten thousand take an hour and a half. So one
`restic backup` stores a directory with all states of a VM's disk, one directory each, and this adds the snapshots, one
for each of these directories, as restic's published format has them: JSON, encrypted by AES-256-CTR and authenticated by
Poly1305-AES under the repository's master key, in a file that is named by its SHA-256. `restic check` accepts them. What
restic made for `HOST-all` becomes the snapshots of HOST, and is forgotten.

The environment names the repository as restic wants it. BEGIN is the time of the first state in seconds; they are an
hour apart.
"""

import base64
import ctypes
import datetime
import hashlib
import json
import os
import subprocess
import sys

CRYPTO = ctypes.CDLL("libcrypto.so.3")
for function in ("EVP_CIPHER_CTX_new", "EVP_aes_128_ecb", "EVP_aes_256_ctr"):
    getattr(CRYPTO, function).restype = ctypes.c_void_p
# The prime of Poly1305, and the bits of its key that count.
PRIME = (1 << 130) - 5
CLAMP = 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF


def aes(cipher, key, iv, text):
    context = ctypes.c_void_p(CRYPTO.EVP_CIPHER_CTX_new())
    out, length = ctypes.create_string_buffer(len(text) + 16), ctypes.c_int(0)
    done = CRYPTO.EVP_EncryptInit_ex(context, ctypes.c_void_p(cipher), None, key, iv)
    done = done and CRYPTO.EVP_EncryptUpdate(context, out, ctypes.byref(length), text, len(text))
    CRYPTO.EVP_CIPHER_CTX_free(context)
    if not done:
        sys.exit("points_restic: libcrypto cannot encrypt")
    return out.raw[: len(text)]


def poly1305(text, r, s):
    total, r = 0, int.from_bytes(r, "little") & CLAMP
    for at in range(0, len(text), 16):
        total = (total + int.from_bytes(text[at : at + 16] + b"\x01", "little")) * r % PRIME
    return ((total + int.from_bytes(s, "little")) % (1 << 128)).to_bytes(16, "little")


def seal(master, text):
    iv = os.urandom(16)
    encrypted = aes(CRYPTO.EVP_aes_256_ctr(), master["encrypt"], iv, text)
    s = aes(CRYPTO.EVP_aes_128_ecb(), master["k"], None, iv)
    return iv + encrypted + poly1305(encrypted, master["r"], s)


def restic(*arguments):
    return subprocess.run(["restic", *arguments], check=True, stdout=subprocess.PIPE).stdout


def add_snapshot(master, host, tree, time):
    snapshot = {
        "time": datetime.datetime.fromtimestamp(time, datetime.timezone.utc).isoformat(),
        "tree": tree,
        "paths": ["/var/lib/libvirt/images/" + host],
        "hostname": host,
        "username": "root",
    }
    sealed = seal(master, json.dumps(snapshot).encode())
    name = hashlib.sha256(sealed).hexdigest()
    with open(os.path.join(os.environ["RESTIC_REPOSITORY"], "snapshots", name), "wb") as out:
        out.write(sealed)


def main():
    begin = int(sys.argv[1])
    keys = json.loads(restic("cat", "masterkey"))
    master = {
        "encrypt": base64.b64decode(keys["encrypt"]),
        "k": base64.b64decode(keys["mac"]["k"]),
        "r": base64.b64decode(keys["mac"]["r"]),
    }
    made = json.loads(restic("snapshots", "--json"))
    for snapshot in made:
        host = snapshot["hostname"].removesuffix("-all")
        for number, node in enumerate(json.loads(restic("cat", "blob", snapshot["tree"]))["nodes"]):
            add_snapshot(master, host, node["subtree"], begin + 3600 * number)
    restic("-q", "forget", *(snapshot["id"] for snapshot in made))


main()
