# An agent that gives out SPIFFE identities, with the messages and the service that py-spiffe was
# generated with, over grpcio; then py-spiffe as the client of the same agent, and a service that
# it talks to by what it was given.
#
# usage: python agent.py DIRECTORY
#
# Makes in DIRECTORY: server.sock, client.sock and stranger.sock, one for each identity, since
# nothing else tells their callers apart. Waits for `address`, where the service listens, then asks
# it as the client, as the stranger and as nobody, renews the service's certificate and at last
# takes its identity away.

import socket
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from spiffe import X509Source
from spiffe._proto import workload_pb2, workload_pb2_grpc

DOMAIN = "spiffe://example.org"
SECS_MAX = 30


def certificate(name, ids, key, issuer_name, issuer_key, is_ca):
    now = datetime.now(timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(i) for i in ids]),
            critical=False,
        )
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_ca,
                key_cert_sign=is_ca,
                crl_sign=is_ca,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if not is_ca:
        purposes = [x509.ExtendedKeyUsageOID.SERVER_AUTH, x509.ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def name(text):
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


class Authority:
    def __init__(self):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = name("authority of example.org")
        made = certificate(self.name, [DOMAIN], self.key, self.name, self.key, True)
        self.der = made.public_bytes(serialization.Encoding.DER)

    def svid(self, id):
        key = ec.generate_private_key(ec.SECP256R1())
        made = certificate(name("workload"), [id], key, self.name, self.key, False)
        pkcs8 = key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return workload_pb2.X509SVID(
            spiffe_id=id,
            x509_svid=made.public_bytes(serialization.Encoding.DER),
            x509_svid_key=pkcs8,
            bundle=self.der,
        )


class Agent(workload_pb2_grpc.SpiffeWorkloadAPIServicer):
    """Says to whoever asks that it is `id`, and says it anew when told to."""

    def __init__(self, authority, id, socket_path):
        self.authority, self.id = authority, id
        self.changed = threading.Condition()
        self.turn, self.withdrawn, self.askers = 0, False, 0
        self.svid = authority.svid(id)
        self.server = grpc.server(ThreadPoolExecutor(8))
        workload_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(self, self.server)
        self.server.add_insecure_port(f"unix:{socket_path}")
        self.server.start()

    def FetchX509SVID(self, request, context):
        if ("workload.spiffe.io", "true") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no security header")
        seen = -1
        while context.is_active():
            with self.changed:
                self.changed.wait_for(lambda: self.turn != seen, timeout=1)
                if self.turn == seen:
                    continue
                seen, svid, withdrawn = self.turn, self.svid, self.withdrawn
            if withdrawn:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
            yield workload_pb2.X509SVIDResponse(svids=[svid])

    def say(self, svid=None):
        with self.changed:
            self.turn, self.withdrawn = self.turn + 1, svid is None
            self.svid = svid or self.svid
            self.changed.notify_all()


class Client:
    """Asks the service by what py-spiffe was given at a socket."""

    def __init__(self, directory, socket_name):
        self.source = X509Source(
            socket_path=f"unix:{directory / socket_name}.sock", timeout_in_seconds=SECS_MAX
        )
        context = self.source.get_x509_context()
        svid = context.default_svid
        trusted = context.x509_bundle_set.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
        self.id = str(svid.spiffe_id)
        chain, key, roots = (directory / f"{socket_name}.{end}" for end in ("crt", "key", "ca"))
        svid.save(str(chain), str(key), serialization.Encoding.PEM)
        trusted.save(str(roots), serialization.Encoding.PEM)
        self.tls = context_for(roots)
        self.tls.load_cert_chain(chain, key)


def context_for(roots):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # An X.509-SVID names no host; the id in it is checked by who asks.
    tls.check_hostname = False
    tls.load_verify_locations(roots)
    return tls


def ask(address, tls):
    """The service's id and serial number, and the status line of its answer."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as plain:
        with tls.wrap_socket(plain, server_hostname=host) as secure:
            shown = x509.load_der_x509_certificate(secure.getpeercert(binary_form=True))
            names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName)
            ids = names.value.get_values_for_type(x509.UniformResourceIdentifier)
            secure.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            status = secure.makefile("rb").readline().decode()
            if not status:
                raise ssl.SSLError("the connection ended")
            return ids, shown.serial_number, status.strip()


def refused(address, tls):
    try:
        return ask(address, tls) is None
    except (ssl.SSLError, ConnectionError):
        return True


def until(what, look):
    end = time.monotonic() + SECS_MAX
    while not look():
        if time.monotonic() > end:
            sys.exit(f"{what}: not within {SECS_MAX} s")
        time.sleep(0.05)


def main():
    directory = Path(sys.argv[1])
    authority = Authority()
    server = Agent(authority, f"{DOMAIN}/builderd", directory / "server.sock")
    others = [
        Agent(authority, f"{DOMAIN}/{name}", directory / f"{name}.sock")
        for name in ("client", "stranger")
    ]
    until("the service's address", (directory / "address").exists)
    address = (directory / "address").read_text()

    client, stranger = Client(directory, "client"), Client(directory, "stranger")
    ids, first, status = ask(address, client.tls)
    assert ids == [f"{DOMAIN}/builderd"], ids
    assert status == "HTTP/1.1 200 OK", status
    print(f"ok {client.id} is let in by {ids[0]}", flush=True)

    assert refused(address, stranger.tls), "a stranger is let in"
    assert refused(address, context_for(directory / "client.ca")), "nobody is let in"
    print(f"ok {stranger.id} and nobody are refused", flush=True)

    server.say(authority.svid(server.id))
    until("the new certificate", lambda: ask(address, client.tls)[1] != first)
    print("ok a renewed certificate is shown", flush=True)

    server.say()
    until("the end of the identity", lambda: refused(address, client.tls))
    server.say(authority.svid(server.id))
    until("the identity's return", lambda: not refused(address, client.tls))
    print("ok a withdrawn identity closes the doors until it returns", flush=True)
    for agent in [server, *others]:
        agent.server.stop(0)


main()
