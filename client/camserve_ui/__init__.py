"""A local web page that shows explanations of a camserve server: `camserve ui`.

The process serves the page over HTTP and forwards its requests over gRPC. It keeps no state: each request of the page
contains its image, and images exist only in the memory of the browser tab and of the request. The package requires
`pip install 'camserve[ui]'`.
"""

from camserve_ui.app import create_app
from camserve_ui.web_server import DEFAULT_LISTEN, run

__all__ = ["DEFAULT_LISTEN", "create_app", "run"]
