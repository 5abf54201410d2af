"""Messages to other systems: written with the results of an entry, and sent when the PACS has them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import ssl
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hl7
import hl7.mllp
from pydicom import Dataset

from camserve.addresses import split_host_port
from camserve_dicom.class_codes import find_code
from camserve_dicom.explaining import DicomExplanation
from camserve_dicom.gateway.audit import Audit
from camserve_dicom.gateway.claimed import record_results
from camserve_dicom.gateway.config import Config, ConfigError
from camserve_dicom.gateway.http_requests import HttpDestination
from camserve_dicom.gateway.messages import Finding, Message, hl7_message, json_message
from camserve_dicom.gateway.notification_config import Notification
from camserve_dicom.gateway.spool import Spool, Stage, move_file, write_file
from camserve_dicom.gateway.workers import PermanentFailure, TemporaryFailure, retry_delay_s
from camserve_dicom.structured_report import SCHEME

__all__ = ["NotificationStep", "finish", "study_messages", "write_messages"]

# Folder of the messages that are not sent yet. The name of a file is that of the notification.
UNSENT = "unsent"
# Folder of the messages that a receiver has refused.
REFUSED = "refused"
# Seconds that the end of a TLS connection may take.
CLOSE_TIMEOUT_S = 1.0


def write_messages(config: Config, spool: Spool, entry: Path, made: DicomExplanation) -> None:
    """Write the message of each notification about an image, so that it is the same each time that it is sent."""
    shutil.rmtree(entry / UNSENT, ignore_errors=True)  # an interrupted attempt may have left some
    explanation, receipt = made.explanation, made.explanation.receipt
    code = find_code(config.class_codes, explanation.target, receipt.model)
    finding = Finding(
        object=entry.name,
        index=explanation.target.index,
        label=explanation.target.label,
        code=(code.code, code.scheme, code.meaning) if code else None,
        values={"probability": explanation.target.probability, **explanation.scores},
        model=receipt.model,
        model_digest=receipt.model_digest,
        method=receipt.method,
        withheld=made.withheld,
        warnings=made.warnings,
    )
    results = [(kind, str(each.SOPClassUID), str(each.SOPInstanceUID)) for kind, each in made.objects.items()]
    message = ("results.stored", entry.name, datetime.now(UTC), made.image.source, results, [finding])
    for name, content in _messages(config, spool, "images", *message).items():
        write_file(entry / UNSENT / name, content, new_folder=True)


def study_messages(
    config: Config, spool: Spool, entry: str, time: float, header: Dataset, images: dict[str, Any], made: list[Any]
) -> dict[str, bytes]:
    """Return the message of each notification about a study, by the path of its file in the entry of the report.

    Args:
        config: The configuration.
        spool: The spool.
        entry: Name of the entry.
        time: Time of the report, in seconds of Unix time.
        header: Attributes of patient and study.
        images: What the report says about each image, as of `ExplainedImage.to_json`, by its name in the audit trail.
        made: `Reference` of each object that was made.
    """
    findings = []
    for name, image in images.items():
        value, scheme, meaning, _ = image["finding"]
        findings.append(
            Finding(
                object=name,
                code=None if scheme == SCHEME else (value, scheme, meaning),
                values={name: number for name, number, _ in image["values"]},
                **{key: image[key] for key in ("index", "label", "model", "model_digest", "method", "withheld")},
                warnings=image["warnings"],
            )
        )
    results = [(each.kind, each.sop_class, each.sop_instance) for each in made]
    message = ("study.stored", entry, datetime.fromtimestamp(time, UTC), header, results, findings)
    return {f"{UNSENT}/{name}": each for name, each in _messages(config, spool, "studies", *message).items()}


def _messages(
    config: Config, spool: Spool, about: str, kind: str, entry: str, time: datetime, header: Dataset,
    results: Sequence[tuple[str, str, str]], findings: Sequence[Finding],
) -> dict[str, bytes]:  # fmt: skip
    """Return the message of each notification about images or studies, by its name."""
    uids, messages = sorted(uid for *_, uid in results), {}
    for notification in (each for each in config.notifications if about in each.about):
        # 20 characters, the maximum of MSH-10. The key of the spool makes it independent of the header.
        identifier = spool.entry_name("\n".join([notification.name, *uids]))[:20].upper()
        message = Message(kind, identifier, entry, time, header, results, findings)
        make = json_message if notification.mllp is None else hl7_message
        messages[notification.name] = make(message, notification)
    return messages


def finish(spool: Spool, entry: Path) -> None:
    """Move an entry whose results the PACS has to `notify` if a message is to be sent, otherwise remove it."""
    record_results(spool, entry)
    if (entry / UNSENT).exists():
        spool.move(entry, Stage.notify)
    else:
        spool.remove(entry)


class NotificationStep:
    """Sends the messages of an entry, and removes the entry."""

    def __init__(self, config: Config, spool: Spool, audit: Audit) -> None:
        self._spool, self._audit = spool, audit
        self._notifications: Mapping[str, Notification] = {each.name: each for each in config.notifications}
        self._tls = config.tls
        # Monotonic time before which a receiver that failed gets no message, and the number of failures. Otherwise each
        # entry would wait for the timeout of a receiver that does not respond, and delay the messages to others.
        self._failed: dict[str, tuple[float, int]] = {}

    def __call__(self, entry: Path) -> None:
        """Send the messages that are not sent yet. A failure of one does not keep the others from being sent.

        Raises:
            TemporaryFailure: If a receiver is not available.
            PermanentFailure: If a receiver refuses a message.
        """
        temporary: TemporaryFailure | None = None
        for file in sorted((entry / UNSENT).glob("[!.]*")):
            try:
                status = self._send_unless_failed(file.name, file.read_bytes())
            except TemporaryFailure as failure:
                temporary = min(temporary or failure, failure, key=lambda each: each.retry_after_s or 0.0)
            except PermanentFailure as failure:
                self._audit.write("not notified", object=entry.name, notification=file.name, reason=failure.reason)
                move_file(file, entry / REFUSED / file.name)  # it is not sent again while others are retried
            else:
                self._audit.write_once("notified", object=entry.name, notification=file.name, status=status)
                file.unlink()
        if temporary is not None:
            raise temporary
        if refused := sorted((entry / REFUSED).glob("[!.]*")):
            for file in refused:  # an operator may move the entry back
                move_file(file, entry / UNSENT / file.name)
            raise PermanentFailure(f"a message was refused by {', '.join(file.name for file in refused)}")
        self._spool.remove(entry)

    def _send_unless_failed(self, name: str, message: bytes) -> str:
        """Send a message, and return the status of the receiver, unless the receiver failed shortly before."""
        not_before, failures = self._failed.get(name, (0.0, 0))
        if (wait_s := not_before - time.monotonic()) > 0:
            raise TemporaryFailure(f"{name}: waits after a failure", wait_s)
        try:
            status = self._send(name, message)
        except TemporaryFailure as failure:
            delay = retry_delay_s(failures) if failure.retry_after_s is None else failure.retry_after_s
            self._failed[name] = (time.monotonic() + delay, failures + (failure.retry_after_s is None))
            raise TemporaryFailure(failure.reason, delay) from failure
        self._failed.pop(name, None)
        return status

    def _send(self, name: str, message: bytes) -> str:
        """Send a message, and return the status of the receiver."""
        notification = self._notifications.get(name)
        if notification is None:
            raise PermanentFailure("the configuration has no notification of this name")
        try:
            if notification.url is not None:
                return _post(notification, message)
            # The files are read for each message, because certificates are renewed while the gateway runs.
            context = self._tls.client_context() if notification.tls and self._tls is not None else None
            return asyncio.run(_exchange(notification, message, context))
        except ConfigError as error:
            raise TemporaryFailure(f"{name}: a file of [tls] is invalid") from error
        except TimeoutError as error:
            raise TemporaryFailure(f"{name}: no response in time") from error
        except OSError as error:
            raise TemporaryFailure(f"{name}: no connection, or a file of the configuration cannot be read") from error
        except (EOFError, ValueError, LookupError, hl7.HL7Exception, hl7.mllp.InvalidBlockError) as error:
            raise TemporaryFailure(f"{name}: the response is not an acknowledgement of the message") from error


def _post(notification: Notification, message: bytes) -> str:
    assert notification.url is not None
    destination = HttpDestination(
        notification.url, notification.ca, notification.authorization_file, notification.timeout_s
    )
    headers = {
        "Content-Type": "application/json",
        # The name that the specification Standard Webhooks gives to the identifier.
        "webhook-id": json.loads(message)["id"],
    }
    response = destination.post(message, headers)
    if response.is_temporary:
        raise TemporaryFailure(f"{notification.name}: HTTP {response.status}", response.retry_after_s)
    if not response.is_success:
        raise PermanentFailure(f"HTTP {response.status}")
    return f"HTTP {response.status}"


async def _exchange(notification: Notification, message: bytes, context: ssl.SSLContext | None) -> str:
    """Send a message by MLLP, and return the code of its acknowledgement: AA or CA."""
    assert notification.mllp is not None
    host, port = split_host_port(notification.mllp)
    deadline = asyncio.get_running_loop().time() + notification.timeout_s
    async with asyncio.timeout_at(deadline):
        reader, writer = await hl7.mllp.open_hl7_connection(host, int(port), ssl=context)
    try:
        async with asyncio.timeout_at(deadline):
            writer.writeblock(message)
            await writer.drain()
            block = await reader.readblock()
    finally:
        writer.close()
        with contextlib.suppress(OSError, TimeoutError):  # how the connection ends does not matter
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await writer.wait_closed()
        writer.transport.abort()
    # Some engines end the segments of acknowledgements with line feeds.
    response = re.sub(r"\r?\n", "\r", block.decode("utf-8", "replace"))
    acknowledgement = hl7.parse(response).segment("MSA")
    code, identifier = str(acknowledgement[1]), str(acknowledgement[2])
    if identifier != str(hl7.parse(message.decode()).segment("MSH")[10]):
        raise ValueError("the acknowledgement is for another message")
    if code not in ("AA", "AE", "AR", "CA", "CE", "CR"):  # it may be any text, which must not get into the log
        raise ValueError("the acknowledgement has an unknown code")
    if code in ("AR", "CR"):  # rejected for a reason that does not lie in the message (HL7 v2.5.1, 2.9.2)
        raise TemporaryFailure(f"{notification.name}: acknowledgement {code}")
    if code not in ("AA", "CA"):
        raise PermanentFailure(f"acknowledgement {code}")
    return code
