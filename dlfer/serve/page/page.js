"use strict";
// Everything that comes from the server or from a file is written by textContent, never as HTML.

const $ = (id) => document.getElementById(id);
const percent = (value) => (100 * value).toFixed(1) + " %";
const state = { blob: null, image: null, faces: [], stream: null, models: [], key: "", turn: 0 };

function headers() {
  return state.key ? { Authorization: "Bearer " + state.key } : {};
}

async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: headers() });
  } catch {
    throw new Error("The server cannot be reached, or closed the connection because the picture is too large.");
  }
  const body = await answer.json().catch(() => ({}));
  if (answer.status === 401) askForKey();
  if (!answer.ok) throw new Error(body.error || `The server answered ${answer.status}.`);
  return body;
}

function askForKey() {
  $("key-row").hidden = false;
  $("key").focus();
}

function tell(words) {
  $("problem").hidden = true;
  $("status").textContent = words;
}

function complain(error) {
  $("status").textContent = "";
  $("problem").hidden = false;
  $("problem").textContent = error.message;
}

async function loadModels() {
  const answer = await call("v1/models");
  state.models = answer.models;
  $("notice").textContent = answer.notice;
  $("version").textContent = answer.version;
  if (answer.faces === "whole") {
    $("whole").checked = true;
    $("whole").disabled = true;
  }
  $("model").replaceChildren(
    ...state.models.map((card) => {
      const accuracy = card.accuracy ? percent(card.accuracy.value) : null;
      const words = [card.name, card.backbone, card.optimizer, accuracy].filter(Boolean);
      return new Option(words.join(" · "), card.name);
    }),
  );
  showCard();
  $("problem").hidden = true;
}

function showCard() {
  const card = state.models.find((one) => one.name === $("model").value);
  if (!card) return;
  const words = [];
  if (card.smoke) words.push("Model of a smoke run: its predictions are meaningless.");
  if (card.accuracy) {
    const { value, low, high, n, what } = card.accuracy;
    const interval = low === null || high === null ? "" : ` (95 %: ${percent(low)} to ${percent(high)})`;
    words.push(`Accuracy ${percent(value)}${interval}, n = ${n.toLocaleString("en")}, ${what}.`);
  } else {
    words.push("Its accuracy is not known.");
  }
  if (card.optimizer) words.push(`Optimiser: ${card.optimizer}.`);
  if (card.protocol) words.push(`Protocol: ${card.protocol}.`);
  if (card.banner) words.push(card.banner);
  words.push(`Probabilities: ${card.probabilities}.`);
  if (card.research_only) words.push("For research only.");
  $("card").textContent = words.join(" ");
}

function makeForm(name) {
  const form = new FormData();
  form.append("file", state.blob, name || "picture");
  if ($("model").value) form.append("model", $("model").value);
  form.append("faces", $("whole").checked ? "whole" : "auto");
  return form;
}

async function predict() {
  if (!state.blob) return;
  const turn = ++state.turn;
  tell("Detecting faces …");
  $("faces").replaceChildren();
  state.faces = [];
  draw();
  try {
    const form = makeForm(state.blob.name);
    form.append("crops", "true");
    const answer = await call("v1/predict", { method: "POST", body: form });
    if (turn !== state.turn) return;
    const picture = answer.images[0];
    state.faces = picture.faces;
    draw(picture);
    showFaces(picture, answer.model);
  } catch (error) {
    if (turn === state.turn) complain(error);
  }
}

function draw(picture) {
  const canvas = $("canvas"), image = state.image;
  if (!image) return;
  // The server's size is that of the upright picture, and so is the browser's.
  const width = picture ? picture.width : image.width, height = picture ? picture.height : image.height;
  // Small pictures are enlarged, so that lines and words on them are sharp.
  const longest = Math.max(width, height), scale = Math.min(1600, Math.max(800, longest)) / longest;
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  const unit = canvas.width / Math.max(280, canvas.clientWidth || canvas.width);
  state.faces.forEach((face, number) => {
    if (!face.box) return;
    const [x0, y0, x1, y1] = face.box.map((value) => value * scale);
    pen.lineWidth = 6 * unit;
    pen.strokeStyle = "#000";
    pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
    pen.lineWidth = 2.5 * unit;
    pen.strokeStyle = "#fff";
    pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
    const words = `${number + 1}: ${face.label}`;
    pen.font = `600 ${16 * unit}px system-ui, sans-serif`;
    const wide = pen.measureText(words).width + 12 * unit, high = 24 * unit;
    const left = Math.min(Math.max(0, x0 - 2 * unit), Math.max(0, canvas.width - wide));
    const top = y0 - high >= 0 ? y0 - high : Math.min(y1, canvas.height - high);
    pen.fillStyle = "#000";
    pen.fillRect(left, top, wide, high);
    pen.fillStyle = "#fff";
    pen.textBaseline = "middle";
    pen.fillText(words, left + 6 * unit, top + high / 2);
  });
  const told = state.faces.map((face, number) => `face ${number + 1}, ${face.label}`).join("; ");
  canvas.setAttribute("aria-label", told ? `The picture with ${told}` : "The picture");
}

function showFaces(picture, model) {
  const found = picture.num_faces_found, shown = picture.faces.length;
  if (!found) {
    tell("No face was found. If the picture is a crop of one face, tick the box below it.");
  } else {
    const more = found > shown ? `; the ${shown} largest are predicted` : "";
    tell(`${found} ${found === 1 ? "face" : "faces"}${$("whole").checked ? " (the whole picture)" : " found"}${more}.`);
  }
  $("faces").replaceChildren(...picture.faces.map((face, number) => makeFace(face, number, model, picture)));
}

// What becomes of a face: the picture, the face that was found in it, and what the model is given.
function makeSteps(face, number, picture) {
  const steps = [], image = state.image;
  const add = (element, name, words) => {
    const step = document.createElement("li"), caption = document.createElement("span");
    if (element.tagName === "IMG") element.alt = name;
    else {
      element.setAttribute("role", "img");
      element.setAttribute("aria-label", name);
    }
    caption.textContent = words;
    step.append(element, caption);
    steps.push(step);
  };
  if (image) {
    const scale = Math.min(1, 320 / Math.max(picture.width, picture.height));
    add(cut(image, [0, 0, picture.width, picture.height], picture, scale, face.box), "The picture", "1. picture");
    if (face.box) {
      const side = Math.max(face.box[2] - face.box[0], face.box[3] - face.box[1]);
      add(cut(image, face.box, picture, 320 / side), `Face ${number + 1} as found in the picture`, "2. face found");
    }
  }
  if (face.crop_png) {
    const crop = new Image();
    crop.src = "data:image/png;base64," + face.crop_png;
    add(crop, `Face ${number + 1} as given to the model`, `${steps.length + 1}. given to the model`);
  }
  return steps;
}

function cut(image, [x0, y0, x1, y1], picture, scale, box) {
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  canvas.width = Math.max(1, Math.round((x1 - x0) * scale));
  canvas.height = Math.max(1, Math.round((y1 - y0) * scale));
  // The browser's image may be larger or smaller than the picture that the server measured.
  const across = (image.width / picture.width), down = (image.height / picture.height);
  pen.drawImage(image, x0 * across, y0 * down, (x1 - x0) * across, (y1 - y0) * down, 0, 0, canvas.width, canvas.height);
  for (const [width, colour] of box ? [[5, "#000"], [2, "#fff"]] : []) {
    pen.lineWidth = width;
    pen.strokeStyle = colour;
    pen.strokeRect(...[box[0], box[1], box[2] - box[0], box[3] - box[1]].map((value) => value * scale));
  }
  return canvas;
}

function makeFace(face, number, model, picture) {
  const item = $("face-template").content.firstElementChild.cloneNode(true);
  const find = (selector) => item.querySelector(selector);
  find("h3").textContent = `Face ${number + 1}: ${face.label}, ${percent(face.confidence)}`;
  find(".where").textContent = face.box
    ? `at ${Math.round(face.box[0])}, ${Math.round(face.box[1])}; ` +
      `${Math.round(face.box[2] - face.box[0])} × ${Math.round(face.box[3] - face.box[1])} pixels`
    : "the whole picture";
  find(".steps").append(...makeSteps(face, number, picture));
  const card = state.models.find((one) => one.name === model);
  find(".prepared").textContent = card && card.preparation ? `Given to the model: ${card.preparation}.` : "";
  const rows = Object.entries(face.probabilities).map(([label, value]) => {
    const row = document.createElement("tr");
    if (label === face.label) row.className = "best";
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = label;
    const cell = document.createElement("td"), bar = document.createElement("progress");
    bar.className = "bar";
    bar.max = 1;
    bar.value = value;
    bar.setAttribute("aria-hidden", "true");
    cell.append(bar);
    const last = document.createElement("td");
    last.textContent = percent(value);
    row.append(head, cell, last);
    return row;
  });
  find("tbody").append(...rows);
  const choice = find(".label");
  choice.append(...Object.keys(face.probabilities).map((label) => new Option(label, label, false, label === face.label)));
  find(".explain").addEventListener("click", () => explain(item, number, model));
  return item;
}

async function explain(item, number, model) {
  const find = (selector) => item.querySelector(selector), button = find(".explain");
  const form = makeForm(state.blob.name);
  form.set("model", model);
  form.append("face", String(number));
  form.append("label", find(".label").value);
  button.disabled = true;
  button.textContent = "Computing the occlusion map …";
  try {
    const answer = await call("v1/explain", { method: "POST", body: form });
    find(".heat").src = "data:image/png;base64," + answer.map_png;
    find(".heat").alt = `Occlusion map of ${answer.label}: ${answer.description}`;
    const points = (value) => (100 * value).toFixed(0);
    find(".legend").textContent =
      `orange: covering it lowers ${answer.label} (by up to ${points(answer.largest_fall)} percentage point${points(answer.largest_fall) === "1" ? "" : "s"}); ` +
      `blue: raises it (up to ${points(answer.largest_rise)})` +
      (answer.largest_fall > 0 ? "; framed: where it falls most" : "");
    find(".words").textContent = answer.description;
    find(".map").hidden = false;
    $("problem").hidden = true;
  } catch (error) {
    complain(error);
  } finally {
    button.disabled = false;
    button.textContent = "Show the occlusion map";
  }
}

async function take(blob) {
  stopCamera();
  state.blob = blob;
  state.faces = [];
  if (state.image && state.image.close) state.image.close();
  state.image = null;
  $("drop").classList.add("full");
  try {
    state.image = await createImageBitmap(blob, { imageOrientation: "from-image" });
    $("stage").hidden = false;
    $("canvas").hidden = false;
    $("drop-words").hidden = true;
  } catch {
    // The server decides what a picture is; this browser cannot show it.
    $("stage").hidden = true;
    $("drop").classList.remove("full");
    $("drop-words").hidden = false;
    $("drop-words").textContent = `${blob.name || "The file"} cannot be shown by this browser.`;
  }
  await predict();
}

async function startCamera() {
  if (!navigator.mediaDevices) {
    complain(new Error("The camera works only over https or on this computer (localhost)."));
    return;
  }
  try {
    state.stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" }, audio: false });
  } catch (error) {
    complain(new Error(`The camera was not opened (${error.name}).`));
    return;
  }
  state.turn++;
  state.faces = [];
  $("faces").replaceChildren();
  $("video").srcObject = state.stream;
  await $("video").play();
  $("drop").classList.add("full");
  for (const [id, hidden] of [["stage", false], ["video", false], ["canvas", true], ["drop-words", true]]) $(id).hidden = hidden;
  for (const [id, hidden] of [["snap", false], ["camera-stop", false], ["camera", true]]) $(id).hidden = hidden;
  $("snap").focus();
  tell("The camera is on. Nothing is sent before you take a picture.");
}

function stopCamera() {
  if (!state.stream) return;
  state.stream.getTracks().forEach((track) => track.stop());
  state.stream = null;
  $("video").srcObject = null;
  for (const [id, hidden] of [["video", true], ["canvas", !state.image], ["snap", true], ["camera-stop", true], ["camera", false]]) {
    $(id).hidden = hidden;
  }
  if (!state.image) {
    $("stage").hidden = true;
    $("drop-words").hidden = false;
    $("drop").classList.remove("full");
  }
  tell("The camera is off.");
}

async function snap() {
  const video = $("video"), canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
  if (blob) await take(new File([blob], "camera.jpg", { type: blob.type }));
}

$("file").addEventListener("change", () => {
  if ($("file").files.length) take($("file").files[0]);
  $("file").value = "";
});
$("file").addEventListener("focus", () => $("choose").classList.add("focused"));
$("file").addEventListener("blur", () => $("choose").classList.remove("focused"));
$("camera").addEventListener("click", startCamera);
$("camera-stop").addEventListener("click", stopCamera);
$("snap").addEventListener("click", snap);
$("model").addEventListener("change", () => { showCard(); predict(); });
$("whole").addEventListener("change", predict);
$("key-use").addEventListener("click", () => {
  state.key = $("key").value.trim();
  loadModels().then(() => { $("key-row").hidden = true; return predict(); }).catch(complain);
});
$("key").addEventListener("keydown", (event) => { if (event.key === "Enter") $("key-use").click(); });
for (const name of ["dragover", "dragenter"]) {
  document.addEventListener(name, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
}
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) take(file);
});
window.addEventListener("pagehide", stopCamera);
loadModels().catch(complain);
