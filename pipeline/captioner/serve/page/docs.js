"use strict";

const find = (selector) => document.querySelector(selector);

function element(tag, text, ...children) {
  const made = document.createElement(tag);
  made.textContent = text;
  made.append(...children);
  return made;
}

function row(name, kind, text) {
  return element("tr", "", element("th", "", element("code", name)), element("td", kind), element("td", text));
}

function kindOf(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(kindOf).join(" or ");
  if (schema.type === "array") return `list of ${kindOf(schema.items)}`;
  return schema.format || schema.type || "";
}

function contentOf(content) {
  return Object.entries(content || {}).map(([type, { schema }]) => {
    const kind = schema && !schema.properties ? kindOf(schema) : "";
    return kind && type === "application/json" ? kind : type;
  }).join(", ");
}

function routeOf(path, method, route) {
  const table = element("table", "");
  if (route.requestBody) table.append(row("body", contentOf(route.requestBody.content), ""));
  for (const [status, answer] of Object.entries(route.responses)) {
    table.append(row(status, contentOf(answer.content), answer.description));
  }
  return element("section", "",
    element("h3", "", element("code", `${method.toUpperCase()} ${path}`)),
    element("p", route.summary + (route.description ? `. ${route.description}` : "")), table);
}

function schemaOf(name, schema) {
  const table = element("table", "");
  for (const [field, of] of Object.entries(schema.properties || {})) {
    table.append(row(field, kindOf(of), of.description || ""));
  }
  return element("section", "", element("h3", name), element("p", schema.description || ""), table);
}

async function show() {
  const api = await (await fetch("openapi.json")).json();
  find("#curl").textContent = `curl -F file=@photo.jpg ${location.origin}/caption`;
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, route] of Object.entries(methods)) {
      find("#routes").append(routeOf(path, method, route));
    }
  }
  for (const [name, schema] of Object.entries(api.components.schemas)) {
    find("#schemas").append(schemaOf(name, schema));
  }
}

show();
