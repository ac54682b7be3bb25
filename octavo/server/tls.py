"""TLS from files. The context of a running server takes a renewed certificate without a restart."""

from __future__ import annotations

import ssl

from octavo import env
from octavo.config.server import ServerConfig
from octavo.errors import ConfigError


def make_context(config: ServerConfig) -> ssl.SSLContext | None:
    """A server's context, TLS 1.2 or newer; None where no certificate is configured.

    Raises:
        ConfigError: a file cannot be read, or certificate and key do not belong together.
    """
    if config.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    load_chain(context, config)
    if config.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except (OSError, ssl.SSLError) as exc:
            raise ConfigError(f"Cannot use --ssl-ca-certs {config.ssl_ca_certs}: {exc}.") from None
        context.verify_mode = ssl.VerifyMode(config.ssl_cert_reqs)
    return context


def load_chain(context: ssl.SSLContext, config: ServerConfig) -> None:
    """Read certificate and key into `context`; connections made from now on get them.

    Raises:
        ConfigError: they cannot be used. `context` is as it was.
    """
    if config.ssl_certfile is None:
        return
    # With no password at all, OpenSSL would ask the terminal for one.
    password = env.get("OCTAVO_SSL_KEYFILE_PASSWORD")
    files = (config.ssl_certfile, config.ssl_keyfile)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*files, lambda: password)
        context.load_cert_chain(*files, lambda: password)
    except (OSError, ssl.SSLError) as exc:
        key = config.ssl_keyfile or config.ssl_certfile
        raise ConfigError(
            f"Cannot use the certificate {config.ssl_certfile} with the key {key}: {exc}. The "
            "password of an encrypted key comes from OCTAVO_SSL_KEYFILE_PASSWORD."
        ) from None
