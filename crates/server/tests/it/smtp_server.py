"""A mail server on a free port of 127.0.0.1 that keeps what it gets: smtp_server.py DIR CERT KEY starttls|implicit

Writes its port into DIR/port. Each mail becomes DIR/N.json. Takes mail only from the user "virtward" with the password
"right", and only over TLS.
"""
import asyncio
import email
import email.policy
import json
import os
import ssl
import sys

from aiosmtpd.smtp import SMTP, AuthResult

directory, certificate, key, mode = sys.argv[1:]
count = 0


class Keep:
    async def handle_DATA(self, server, session, envelope):
        global count
        count += 1
        parsed = email.message_from_bytes(envelope.content, policy=email.policy.default)
        mail = {
            "from": envelope.mail_from,
            "to": envelope.rcpt_tos,
            "user": session.auth_data,
            "tls": session.ssl is not None or mode == "implicit",
            "subject": parsed["subject"],
            "text": parsed.get_content(),
            "data": envelope.content.decode(),
        }
        path = os.path.join(directory, f"{count}.json")
        with open(path + ".new", "w") as file:
            json.dump(mail, file)
        os.rename(path + ".new", path)
        return "250 OK"


def authenticate(server, session, envelope, mechanism, data):
    user = data.login.decode()
    is_right = user == "virtward" and data.password == b"right"
    return AuthResult(success=is_right, handled=False, auth_data=user)


async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    starttls = mode == "starttls"

    def server():
        return SMTP(
            Keep(),
            hostname="mx.test",
            tls_context=context if starttls else None,
            require_starttls=starttls,
            authenticator=authenticate,
            auth_required=True,
            auth_require_tls=starttls,
        )

    loop = asyncio.get_running_loop()
    listener = await loop.create_server(server, "127.0.0.1", 0, ssl=None if starttls else context)
    port = listener.sockets[0].getsockname()[1]
    with open(os.path.join(directory, "port.new"), "w") as file:
        file.write(str(port))
    os.rename(os.path.join(directory, "port.new"), os.path.join(directory, "port"))
    await listener.serve_forever()


asyncio.run(main())
