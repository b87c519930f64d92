"""The JSON interface, described as OpenAPI 3.1: what `GET /api` gives. docs/serve.md says the same in words."""

from pylorus import __version__
from pylorus.deploy.app.options import ServeOptions
from pylorus.deploy.app.upload import FIELD
from pylorus.deploy.load import Bundle

Schema = dict[str, object]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
TRUTH: Schema = {"type": "boolean"}
ERRORS = {
    "400": "The form is malformed or cut.",
    "401": "The password is missing or wrong (HTTP Basic, any user name).",
    "403": "Asked by a page from elsewhere.",
    "408": "The files took too long to arrive.",
    "413": "Too many files, or too many bytes in all.",
    "415": "No multipart/form-data.",
    "421": "Called by a name that is not this server's.",
    "503": "Too many requests at once; ask again after Retry-After seconds.",
}


def interface(bundle: Bundle, options: ServeOptions) -> Schema:
    """The description of this server's interface."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Pylorus: predictions of a bundle",
            "version": __version__,
            "description": bundle.description.intended_use,
        },
        "paths": {
            "/api/predict": {"post": _predict(options)},
            "/api/model": {"get": _get("The model behind this server", "Model")},
            "/health": {"get": {**_get("Whether it runs, and with what", "Health"), "security": []}},
        },
        "components": {
            "schemas": {"Row": _row(bundle), "Answer": _answer(), "Model": _model(), "Health": _health()},
            "securitySchemes": {"password": {"type": "http", "scheme": "basic"}},
        },
        "security": [{}] if options.password_file is None else [{"password": []}],
    }


def _predict(options: ServeOptions) -> Schema:
    form = {
        "type": "object",
        "required": [FIELD],
        "properties": {
            FIELD: {
                "type": "array",
                "minItems": 1,
                "maxItems": options.max_images,
                "items": {"type": "string", "contentMediaType": "application/octet-stream"},
                "description": f"JPEG, PNG, BMP, TIFF, WebP or DICOM, each of {options.most_bytes:,} bytes at most.",
            }
        },
    }
    meanings = {
        "image": "With 1 each row has a JPEG (data: URL) of what the network sees.",
        "heat_map": "With 1 each row has the same with what speaks for the predicted class over it, if there are maps.",
    }
    return {
        "summary": "What the model says of images",
        "parameters": [
            {"name": name, "in": "query", "description": text, "schema": {"type": "string", "enum": ["0", "1"]}}
            for name, text in meanings.items()
        ],
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
        "responses": {
            "200": _content("A row a file, in their order", "Answer"),
            **{status: {"description": text} for status, text in ERRORS.items()},
        },
    }


def _row(bundle: Bundle) -> Schema:
    names, deciding = bundle.description.short_names, bundle.description.decision.class_name
    return {
        "type": "object",
        "required": ["file", "error"],
        "description": "Where error is not empty there is nothing else.",
        "properties": {
            "file": TEXT,
            "error": {**TEXT, "description": "Why the file gives no answer; empty where it does."},
            "predicted": {"type": "string", "enum": list(names)},
            "probability": {
                "type": "object",
                "properties": dict.fromkeys(names, NUMBER),
                "description": "Calibrated.",
            },
            "decision": {"type": "string", "enum": [deciding, f"not {deciding}"]},
            "abstain": {**TRUTH, "description": "Whether this answer should not be used."},
            "why": {"type": "string", "enum": ["", "unsure", "unlike"]},
            "prediction_set": {
                "type": "array",
                "items": {"type": "string", "enum": list(names)},
                "description": "Short names; only of a bundle with prediction sets.",
            },
            "unlikeness": {**NUMBER, "description": "How unlike the training images it is, 0 to 2."},
            "image": TEXT,
            "heat_map": TEXT,
        },
    }


def _answer() -> Schema:
    rows = {"type": "array", "items": {"$ref": "#/components/schemas/Row"}}
    return _object(bundle=TEXT, intended_use=TEXT, results=rows)


def _model() -> Schema:
    names: Schema = {"type": "array", "items": TEXT}
    return _object(
        bundle=TEXT,
        architecture=TEXT,
        classes=names,
        short_names={**names, "description": "In the order of classes; what answers call them."},
        decision=_object(**{"class": TEXT, "threshold": {"type": ["number", "null"]}}),
        prediction_sets={
            "oneOf": [{"type": "null"}, _object(coverage=NUMBER)],
            "description": "Null in a bundle without them.",
        },
        abstention=_object(unlike_above=NUMBER, unsure_below=NUMBER),
        limits=_object(most_bytes=NUMBER, most_files=NUMBER),
        no_heat_maps={**TEXT, "description": "Why there are none; empty where there are."},
        intended_use=TEXT,
    )


def _health() -> Schema:
    return _object(status=TEXT, bundle=TEXT, version=TEXT)


def _object(**properties: object) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


def _get(summary: str, schema: str) -> Schema:
    return {"summary": summary, "responses": {"200": _content(summary, schema)}}


def _content(text: str, schema: str) -> Schema:
    return {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
    }
