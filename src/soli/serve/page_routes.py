"""The page's routes: `/` and `/static/…`, without a key, since nothing in them is secret."""

from fastapi import APIRouter, HTTPException, Request, Response

from soli.serve.page_files import page_files


def router() -> APIRouter:
    """Routes for the files of the page; anything else under /static is not found."""
    routes = APIRouter(include_in_schema=False)

    @routes.api_route("/", methods=["GET", "HEAD"])
    @routes.api_route("/static/{name}", methods=["GET", "HEAD"])
    def page(request: Request) -> Response:
        file = page_files().get(request.url.path)
        if file is None:
            raise HTTPException(404)
        if request.headers.get("if-none-match") == file.headers["ETag"]:
            return Response(status_code=304, headers=file.headers)
        return Response(file.content, headers=file.headers)

    return routes
