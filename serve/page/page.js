// The page: one form for all modes, previews as they come, a history that stays in this browser. No build, no request to elsewhere.
"use strict";
const field = id => document.getElementById(id);
const KEPT = "paella-history", MOST_KEPT = 40;
let sources = [];   // {blob, url} of the pictures to start from
let abort = null;

// --- the form ---------------------------------------------------------------------------------------------------------------
function showMode() {
  const mode = field("mode").value;
  for (const part of document.querySelectorAll("[data-modes]")) part.hidden = !part.dataset.modes.split(" ").includes(mode);
}

const NUMBERS = ["num_inference_steps", "guidance_scale", "n", "pad_left", "pad_right", "pad_top", "pad_bottom", "structure_strength",
  "strength", "text_weight", "frames"];

function shown(id) {
  for (let part = field(id); part; part = part.parentElement) if (part.hidden) return false;
  return true;
}

// What is asked for: {url, fields, files}; files go as a form, without them the request is JSON.
function wanted() {
  const mode = field("mode").value, fields = { prompt: field("prompt").value, mode, model: field("model").value || undefined };
  for (const id of NUMBERS) if (shown(id) && field(id).value !== "") fields[id] = Number(field(id).value);
  if (shown("size") && field("size").value) fields.size = field("size").value;
  if (mode !== "interpolate" && field("negative_prompt").value) fields.negative_prompt = field("negative_prompt").value;
  if (mode === "interpolate") fields.prompt_to = field("prompt_to").value;
  if (mode === "blend" && field("weights").value) fields.weights = field("weights").value.split(",").map(Number);
  fields.seed = field("seed").value === "" ? Math.floor(Math.random() * 2 ** 32) : Number(field("seed").value);
  if (fields.model === undefined) delete fields.model;
  const images = mode === "text-to-image" || mode === "interpolate" ? [] : mode === "blend" ? sources : sources.slice(0, 1);
  if (mode === "text-to-image") delete fields.mode;
  return { url: mode === "text-to-image" ? "/v1/images/generations" : "/v1/images/edits", fields, images, mode };
}

async function body({ fields, images, mode }, more) {
  const all = { ...fields, ...more };
  if (!images.length) return { body: JSON.stringify(all), type: "application/json" };
  const form = new FormData();
  for (const [name, value] of Object.entries(all))
    for (const item of [value].flat()) form.append(Array.isArray(value) ? name + "[]" : name, item);
  for (const source of images) form.append("image[]", source.blob, "image.png");
  if (mode === "inpaint") form.append("mask", await maskBlob(), "mask.png");
  return { body: form, type: null };
}

function headers(type) {
  const made = type ? { "content-type": type } : {};
  if (field("key").value) made.authorization = "Bearer " + field("key").value;
  return made;
}

// --- asking, with previews --------------------------------------------------------------------------------------------------
async function make(event) {
  event?.preventDefault();
  if (abort) return;
  const request = wanted(), count = request.fields.frames ?? request.fields.n ?? 1;
  field("error").textContent = "";
  field("status").textContent = "waiting …";
  field("go").disabled = true;
  field("stop").disabled = false;
  abort = new AbortController();
  const figures = Array.from({ length: count }, () => addFigure({ prompt: request.fields.prompt, going: true }));
  try {
    const sent = await body(request, { stream: true, partial_images: 3 });
    const answer = await fetch(request.url, { method: "POST", headers: headers(sent.type), body: sent.body, signal: abort.signal });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    let done = 0;
    for await (const item of serverSentEvents(answer.body)) {
      if (item.error) throw new Error(item.error.message);
      const url = `data:image/${item.output_format};base64,${item.b64_json}`, final = item.type.endsWith("completed");
      done += final;
      field("status").textContent = `${done} of ${count} done`;
      fill(figures[item.image_index], { url, prompt: request.fields.prompt, seed: item.seed, size: item.size, going: !final,
        settings: request.fields, mode: request.mode }, final);
      for (const warning of (final && item.warnings) || []) field("error").textContent = warning;
    }
    field("status").textContent = "";
    if (field("lock").checked) field("seed").value = request.fields.seed;
  } catch (error) {
    field("status").textContent = "";
    field("error").textContent = error.name === "AbortError" ? "stopped" : error.message;
  } finally {
    for (const figure of figures) if (figure.classList.contains("going")) figure.remove();
    abort = null;
    field("go").disabled = false;
    field("stop").disabled = true;
  }
}

async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter(line => line.startsWith("data: ")).map(line => line.slice(6)).join("");
      if (data) yield JSON.parse(data);
    }
  }
}

// --- the gallery ------------------------------------------------------------------------------------------------------------
function button(label, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = label;
  made.addEventListener("click", act);
  return made;
}

function addFigure(picture) {
  const figure = document.createElement("figure");
  figure.append(new Image(), document.createElement("figcaption"));
  field("gallery").prepend(figure);
  fill(figure, picture, false);
  return figure;
}

function fill(figure, picture, keep) {
  const [image, caption] = figure.children;
  figure.classList.toggle("going", Boolean(picture.going));
  if (picture.url) image.src = picture.url;
  image.alt = picture.going ? `preview: ${picture.prompt}` : picture.prompt;
  if (picture.going) { image.dataset.previews = Number(image.dataset.previews || 0) + Boolean(picture.url); return; }
  const link = document.createElement("a");
  link.href = picture.url;
  link.download = `paella-${picture.seed}.png`;
  link.textContent = "Download";
  caption.replaceChildren(`${picture.prompt} · ${picture.mode ?? ""} · seed ${picture.seed} · ${picture.settings?.num_inference_steps ?? ""} steps `,
    link, " ", button("Use settings", () => restore(picture)), " ", button("Use picture", () => useUrl(picture.url)));
  if (keep) remember(picture);
}

function remember(picture) {
  const kept = JSON.parse(localStorage.getItem(KEPT) || "[]");
  kept.push(picture);
  while (kept.length) {
    try { return localStorage.setItem(KEPT, JSON.stringify(kept.slice(-MOST_KEPT))); } catch { kept.shift(); }  // no room
  }
}

function restore({ settings, mode }) {
  field("mode").value = mode;
  showMode();
  for (const [name, value] of Object.entries(settings)) if (field(name)) field(name).value = value;
  field("prompt").focus();
}

// --- pictures to start from, and the mask -----------------------------------------------------------------------------------
async function useUrl(url) {
  await useBlobs([await (await fetch(url)).blob()]);
  if (field("mode").value === "text-to-image") field("mode").value = "inpaint";
  showMode();
}

async function useBlobs(blobs) {
  sources = blobs.map(blob => ({ blob, url: URL.createObjectURL(blob) }));
  field("sources").replaceChildren(...sources.map(({ url }) => Object.assign(new Image(), { src: url, alt: "picture to start from" })));
  if (sources.length) await drawMask();
}

const mask = field("mask"), pen = mask.getContext("2d"), painted = document.createElement("canvas");
let base = null, cursor = null;

async function drawMask() {
  base = Object.assign(new Image(), { src: sources[0].url });
  try { await base.decode(); } catch { field("error").textContent = "this picture cannot be read"; base = null; return; }
  for (const canvas of [mask, painted]) [canvas.width, canvas.height] = [base.naturalWidth, base.naturalHeight];
  cursor = { x: mask.width / 2, y: mask.height / 2 };
  refresh();
}

function refresh() {
  if (!base) return;
  pen.drawImage(base, 0, 0);
  pen.globalAlpha = 0.6;
  pen.drawImage(painted, 0, 0);
  pen.globalAlpha = 1;
  if (document.activeElement === mask) {
    pen.strokeStyle = "white";
    pen.beginPath(); pen.arc(cursor.x, cursor.y, brushSize(), 0, 7); pen.stroke();
  }
}

const brushSize = () => field("brush").value / 100 * Math.max(mask.width, mask.height);

function paint(x, y) {
  const brush = painted.getContext("2d");
  brush.fillStyle = "#e0218a";
  brush.beginPath(); brush.arc(x, y, brushSize(), 0, 7); brush.fill();
  cursor = { x, y };
  refresh();
}

// The picture's own pixels opaque, and alpha 0 wherever something was painted.
async function maskBlob() {
  const made = document.createElement("canvas");
  [made.width, made.height] = [painted.width, painted.height];
  const context = made.getContext("2d"), strokes = painted.getContext("2d").getImageData(0, 0, made.width, made.height);
  const pixels = context.createImageData(made.width, made.height);
  for (let i = 3; i < pixels.data.length; i += 4) pixels.data[i] = strokes.data[i] ? 0 : 255;
  context.putImageData(pixels, 0, 0);
  return new Promise(resolve => made.toBlob(resolve, "image/png"));
}

function pointed(event) {
  if (!base || !(event.buttons & 1)) return;
  const box = mask.getBoundingClientRect();
  paint((event.clientX - box.left) * mask.width / box.width, (event.clientY - box.top) * mask.height / box.height);
}

mask.addEventListener("pointerdown", pointed);
mask.addEventListener("pointermove", pointed);
mask.addEventListener("keydown", event => {
  const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!base || !(by || event.key === " ")) return;
  event.preventDefault();
  if (by) cursor = { x: cursor.x + by[0] * brushSize(), y: cursor.y + by[1] * brushSize() }; else paint(cursor.x, cursor.y);
  refresh();
});
field("clear-mask").addEventListener("click", () => { painted.getContext("2d").clearRect(0, 0, painted.width, painted.height); refresh(); });

// --- copying ----------------------------------------------------------------------------------------------------------------
const quoted = text => "'" + String(text).replaceAll("'", `'\\''`) + "'";

function asCurl() {
  const { url, fields, images, mode } = wanted(), key = field("key").value ? " -H 'authorization: Bearer YOUR_KEY'" : "";
  const start = `curl ${location.origin}${url}${key}`;
  if (!images.length) return `${start} -H 'content-type: application/json' -d ${quoted(JSON.stringify(fields))}`;
  const parts = Object.entries(fields).flatMap(([name, value]) =>
    [value].flat().map(item => `--form-string ${quoted((Array.isArray(value) ? name + "[]" : name) + "=" + item)}`));
  return [start, ...parts, ...images.map((_, i) => `-F 'image[]=@image${i}.png'`), ...(mode === "inpaint" ? ["-F 'mask=@mask.png'"] : [])].join(" ");
}

function asPython() {
  const { fields, images, mode } = wanted(), { prompt, n, size, model, ...ours } = fields, args = { prompt, n, size, model };
  const call = Object.entries(args).filter(([, value]) => value !== undefined).map(([name, value]) => `${name}=${JSON.stringify(value)}`);
  if (images.length) call.unshift(`image=[${images.map((_, i) => `open("image${i}.png", "rb")`).join(", ")}]`);
  if (mode === "inpaint") call.push('mask=open("mask.png", "rb")');
  call.push(`extra_body=${JSON.stringify(ours)}`);
  const method = mode === "text-to-image" ? "generate" : "edit";
  const plain = `client.images.${method}(${call.join(", ")})`, path = `client.post("/images/edits", cast_to=dict, body=${JSON.stringify(fields)})`;
  return `import openai\n\nclient = openai.OpenAI(base_url="${location.origin}/v1", api_key="YOUR_KEY")\n` +
    `answer = ${method === "edit" && !images.length ? path : plain}\n`;
}

async function copy(text) {
  try { await navigator.clipboard.writeText(text); field("status").textContent = "copied"; }
  catch { field("status").textContent = text; }  // no permission: show it, so that it can be copied by hand
}

// --- the start --------------------------------------------------------------------------------------------------------------
async function start() {
  field("form").addEventListener("submit", make);
  field("mode").addEventListener("change", showMode);
  field("stop").addEventListener("click", () => abort?.abort());
  field("curl").addEventListener("click", () => copy(asCurl()));
  field("python").addEventListener("click", () => copy(asPython()));
  field("upload").addEventListener("change", event => useBlobs([...event.target.files]));
  field("key").addEventListener("change", models);
  document.addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) field("form").requestSubmit();
    if (event.key === "Escape") abort?.abort();
  });
  for (const picture of JSON.parse(localStorage.getItem(KEPT) || "[]")) addFigure(picture);
  showMode();
  await models();
}

async function models() {
  const answer = await fetch("/v1/capabilities", { headers: headers() });
  if (!answer.ok) { field("error").textContent = (await answer.json()).error.message; return; }
  const { models, default_model } = await answer.json();
  field("error").textContent = "";
  field("model").replaceChildren(...Object.keys(models).map(name => new Option(name, name, false, name === default_model)));
  for (const option of field("mode").options) option.disabled = !models[default_model].modes.includes(option.value);
}

start();
