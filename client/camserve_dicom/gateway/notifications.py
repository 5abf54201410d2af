"""The step of an entry that tells other systems about its results."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import hl7
import hl7.mllp

from camserve.addresses import split_host_port
from camserve_dicom.class_codes import find_code
from camserve_dicom.explaining import DicomExplanation
from camserve_dicom.gateway.audit import Audit
from camserve_dicom.gateway.config import Config
from camserve_dicom.gateway.http_post import HttpDestination
from camserve_dicom.gateway.messages import Message, hl7_message, json_message
from camserve_dicom.gateway.notification_config import Notification
from camserve_dicom.gateway.spool import Spool, Stage, move_file, write_file
from camserve_dicom.gateway.workers import PermanentFailure, TemporaryFailure

__all__ = ["NotificationStep", "finish", "write_messages"]

# Folder of the messages that are not sent yet. The name of a file is that of the notification.
UNSENT = "unsent"
# Folder of the messages that a receiver has refused.
REFUSED = "refused"


def write_messages(config: Config, spool: Spool, entry: Path, made: DicomExplanation) -> None:
    """Write the message of each notification to the entry, so that it is the same each time that it is sent."""
    shutil.rmtree(entry / UNSENT, ignore_errors=True)  # an interrupted attempt may have left some
    explanation = made.explanation
    code = find_code(config.class_codes, explanation.target, explanation.receipt.model)
    uids = sorted(str(each.SOPInstanceUID) for each in made.objects.values())
    for notification in config.notifications:
        # 20 characters, the maximum of MSH-10. The key of the spool makes it independent of the header.
        identifier = spool.entry_name("\n".join([notification.name, *uids]))[:20].upper()
        message = Message(identifier, entry.name, datetime.now(UTC), made, code)
        make = json_message if notification.mllp is None else hl7_message
        write_file(entry / UNSENT / notification.name, make(message, notification))


def finish(spool: Spool, entry: Path) -> None:
    """Move an entry whose results the PACS has to `notify` if a message is to be sent, otherwise remove it."""
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

    def __call__(self, entry: Path) -> None:
        """Send the messages that are not sent yet. A failure of one does not keep the others from being sent.

        Raises:
            TemporaryFailure: If a receiver is not available.
            PermanentFailure: If a receiver refuses a message.
        """
        temporary: TemporaryFailure | None = None
        for file in sorted((entry / UNSENT).glob("[!.]*")):
            try:
                status = self._send(file.name, file.read_bytes())
            except TemporaryFailure as failure:
                temporary = failure
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

    def _send(self, name: str, message: bytes) -> str:
        """Send a message, and return the status of the receiver."""
        notification = self._notifications.get(name)
        if notification is None:
            raise PermanentFailure("the configuration has no notification of this name")
        if notification.url is not None:
            return _post(notification, message)
        context = self._tls.client_context() if notification.tls and self._tls is not None else None
        try:
            return asyncio.run(asyncio.wait_for(_exchange(notification, message, context), notification.timeout_s))
        except TimeoutError as error:
            raise TemporaryFailure(f"{name}: no response in time") from error
        except OSError as error:
            raise TemporaryFailure(f"{name}: no connection") from error
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
    if not 200 <= response.status < 300:
        raise PermanentFailure(f"HTTP {response.status}")
    return f"HTTP {response.status}"


async def _exchange(notification: Notification, message: bytes, context: ssl.SSLContext | None) -> str:
    """Send a message by MLLP, and return the code of its acknowledgement: AA or CA."""
    assert notification.mllp is not None
    host, port = split_host_port(notification.mllp)
    reader, writer = await hl7.mllp.open_hl7_connection(
        host, int(port), ssl=context, encoding="utf-8", encoding_errors="replace"
    )
    try:
        writer.writeblock(message)
        await writer.drain()
        acknowledgement = (await reader.readmessage()).segment("MSA")
    finally:
        writer.close()
    code, identifier = str(acknowledgement[1]), str(acknowledgement[2])
    if identifier != str(hl7.parse(message.decode()).segment("MSH")[10]):
        raise ValueError("the acknowledgement is for another message")
    if code in ("AR", "CR"):  # rejected for a reason that does not lie in the message (HL7 v2.5.1, 2.9.2)
        raise TemporaryFailure(f"{notification.name}: acknowledgement {code}")
    if code not in ("AA", "CA"):
        raise PermanentFailure(f"acknowledgement {code}")
    return code
