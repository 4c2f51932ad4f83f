"""Kafka and MongoDB as docs/security.md has them: behind TLS, with a user for each process."""

import ipaddress
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pymongo import MongoClient

from local.servers import HOST, KafkaServer, MongoServer

ADMIN = "admin"
MECHANISM: Literal["SCRAM-SHA-512"] = "SCRAM-SHA-512"


class Certificate:
    """A certificate for this machine that is its own authority, in files."""

    def __init__(self, folder: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a server of the tests")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        public = certificate.public_bytes(serialization.Encoding.PEM)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(public)
        self.with_key = folder / "server.pem"
        self.with_key.write_bytes(private + public)


class SecuredKafka(KafkaServer):
    """A Kafka that knows its users by their passwords, and lets them do what was allowed to them and nothing else."""

    def __init__(self, folder: Path, *, certificate: Certificate, passwords: Mapping[str, str], **ports: Any) -> None:
        super().__init__(folder, **ports)
        for user, password in passwords.items():
            self.format_options += ["--add-scram", f"{MECHANISM}=[name={user},password={password}]"]
        login = "org.apache.kafka.common.security.scram.ScramLoginModule required"
        self.settings |= {
            "listeners": self.settings["listeners"].replace("PLAINTEXT://", "SASL_SSL://"),
            "advertised.listeners": f"SASL_SSL://{self.bootstrap}",
            "listener.security.protocol.map": "SASL_SSL:SASL_SSL,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "SASL_SSL",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(certificate.with_key),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(certificate.ca),
            "sasl.enabled.mechanisms": MECHANISM,
            "sasl.mechanism.inter.broker.protocol": MECHANISM,
            f"listener.name.sasl_ssl.{MECHANISM.lower()}.sasl.jaas.config": (
                f'{login} username="{ADMIN}" password="{passwords[ADMIN]}";'
            ),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": f"User:{ADMIN};User:ANONYMOUS",  # the controller's listener is its own, and has no users
            "allow.everyone.if.no.acl.found": "false",
        }


class SecuredMongo(MongoServer):
    """A MongoDB that lets nobody in without TLS and a password."""

    def __init__(self, folder: Path, *, certificate: Certificate, **options: Any) -> None:
        super().__init__(folder, **options)
        key_file = folder / "mongodb-key"
        key_file.write_text("BetweenTheMembersOfTheSet")
        key_file.chmod(0o600)
        self.argv = (*self.argv, "--keyFile", str(key_file), "--tlsMode", "requireTLS")
        self.argv += ("--tlsCertificateKeyFile", str(certificate.with_key), "--tlsCAFile", str(certificate.ca))
        self.argv += ("--tlsAllowConnectionsWithoutCertificates",)
        self.url += f"&tls=true&tlsCAFile={certificate.ca}"

    def url_for(self, user: str, password: str) -> str:
        """The URL by which a user gets in."""
        return self.url.replace("mongodb://", f"mongodb://{user}:{password}@") + "&authSource=admin"

    def add_users(self, roles: Mapping[str, list[str]], passwords: Mapping[str, str]) -> None:
        """Make a user for each, after the first, who may do everything."""
        with MongoClient[dict[str, Any]](self.url) as client:
            client.admin.command("createUser", ADMIN, pwd=passwords[ADMIN], roles=["root"])
        with MongoClient[dict[str, Any]](self.url_for(ADMIN, passwords[ADMIN])) as client:
            for user, granted in roles.items():
                client.admin.command("createUser", user, pwd=passwords[user], roles=granted)
