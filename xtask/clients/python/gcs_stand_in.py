# Cloud Storage as far as its XML API is that of S3, which is as far as builderd goes: moto behind
# TLS and behind the token that a service account signs for itself (google.aip.dev/auth/4111).
# Of that API gcp-storage-emulator (PyPI) has no more than GET and PUT of an object, and
# fake-gcs-server no uploads in parts.
#
# Refuses the second part of the first upload once, and says that objects are older than they are.
#
# usage: python gcs_stand_in.py DIRECTORY PLAIN_PORT TLS_PORT
#
# Makes in DIRECTORY: server.crt, to be trusted, and account.json, the service account's key file.
# PLAIN_PORT is moto itself, which asks nobody who he is.

import base64
import json
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.exceptions import Forbidden, Unauthorized
from werkzeug.serving import make_server, make_ssl_devcert, run_simple

HOST = "127.0.0.1"
ACCOUNT = "builderd@example.iam.gserviceaccount.com"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"


def decoded(part):
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


class Google:
    def __init__(self, moto, public_key):
        self.moto = moto
        self.public_key = public_key
        self.refuses = True

    def __call__(self, environ, start_response):
        try:
            self.check(environ.pop("HTTP_AUTHORIZATION", ""))
            self.refuse(environ.get("QUERY_STRING", ""))
        except (Unauthorized, Forbidden) as refusal:
            return refusal(environ, start_response)
        self.age()
        return self.moto(environ, start_response)

    def check(self, authorization):
        try:
            kind, token = authorization.split(" ")
            signed, _, signature = token.rpartition(".")
            self.public_key.verify(
                decoded(signature), signed.encode(), padding.PKCS1v15(), hashes.SHA256()
            )
            header, claims = (json.loads(decoded(part)) for part in signed.split("."))
        except (ValueError, InvalidSignature) as error:
            raise Unauthorized(f"no token: {error!r}") from error
        wanted = ("Bearer", "RS256", "1", ACCOUNT, ACCOUNT, SCOPE)
        found = (kind, header["alg"], header["kid"], claims["iss"], claims["sub"], claims["scope"])
        if found != wanted or not claims["iat"] - 60 < time.time() < claims["exp"]:
            raise Unauthorized(f"a token of {found}, not of {wanted}")

    def refuse(self, query):
        if self.refuses and "partNumber=2&" in query:
            self.refuses = False
            raise Forbidden("the second part of the first upload")

    def age(self):
        for bucket in s3_backends["123456789012"]["aws"].buckets.values():
            for key in bucket.keys.values():
                key.last_modified = datetime.utcnow() - timedelta(hours=2)


def main(directory, plain_port, tls_port):
    certificate, key = make_ssl_devcert(str(directory / "server"), host="localhost")
    private_key = serialization.load_pem_private_key(Path(key).read_bytes(), password=None)
    account = {
        "type": "service_account",
        "private_key": Path(key).read_text(),
        "private_key_id": "1",
        "client_email": ACCOUNT,
        "gcs_base_url": f"https://localhost:{tls_port}",
    }
    (directory / "account.json").write_text(json.dumps(account))
    moto = DomainDispatcherApplication(create_backend_app)
    google = Google(moto, private_key.public_key())
    tls = make_server(HOST, tls_port, google, threaded=True, ssl_context=(certificate, key))
    threading.Thread(target=tls.serve_forever, daemon=True).start()
    run_simple(HOST, plain_port, moto, threaded=True)


main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
