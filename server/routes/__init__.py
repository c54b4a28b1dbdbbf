"""The server's routes: each file has a function that makes the APIRouter of one endpoint."""
