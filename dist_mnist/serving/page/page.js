// The page of `dist-mnist serve`: it sends drawings and pictures to POST /predict and shows the predictions.

const SIDE = 392 // pixels of the drawing's longer side
const IN_ORDER = 12 // up to this many classes are shown in order; of more, the most probable
const PER_REQUEST = 16 // pictures
const LIVE_MS = 120 // between two requests while a line is drawn

const $ = id => document.getElementById(id)
const pad = $("pad"), context = pad.getContext("2d")
const strokes = [] // the drawing: { points: [[x, y], ...], width, colour }
const pictures = [] // chosen, dropped or pasted: { file, li, found }
let model, shown // shown: "drawing", a picture, or nothing

// The server

async function predict(body) {
  for (let tries = 1; ; tries++) {
    const response = await fetch(`/predict?seen=1&fit=${$("fit").value}`, { method: "POST", body })
    if (response.status === 503 && tries < 10) { // the server is busy
      await new Promise(resolve => setTimeout(resolve, 1000 * response.headers.get("Retry-After")))
      continue
    }
    const answer = await response.json()
    if (answer.error) throw new Error(answer.error)
    return answer.predictions
  }
}

const sentence = error => error instanceof TypeError ? "The server does not answer." : error.message

// The answer

function percent(probability) {
  return probability < 1 && probability > .9995 ? ">99.9 %" : `${(100 * probability).toFixed(1)} %`
}

function show(found) {
  const { class: best, error, name, probabilities, seen } = found ?? {}
  $("seen").hidden = !seen
  if (seen) $("seen").src = seen
  $("class").textContent = name ?? ""
  $("class").className = name?.length > 3 ? "long" : ""
  $("certainty").textContent = error ?? (probabilities ? percent(probabilities[best]) : "")
  $("answer").className = error ? "failed" : ""
  $("seen-caption").textContent = shown?.file?.name ?? `${model.image_shape[2]} × ${model.image_shape[1]} pixels`
  showBars(probabilities ?? model.class_names.map(() => 0), best)
}

function showBars(probabilities, best) {
  let order = [...probabilities.keys()]
  if (order.length > IN_ORDER) order = order.sort((a, b) => probabilities[b] - probabilities[a]).slice(0, IN_ORDER - 2)
  const rows = $("bars").tBodies[0].rows
  while (rows.length < order.length) {
    const row = $("bars").tBodies[0].insertRow()
    row.append(Object.assign(document.createElement("th"), { scope: "row" }))
    row.insertCell().append(document.createElement("data"))
  }
  order.forEach((number, index) => {
    const [name, value] = rows[index].children
    name.textContent = name.title = model.class_names[number]
    value.style.setProperty("--probability", probabilities[number])
    value.firstChild.value = probabilities[number]
    value.firstChild.textContent = best === undefined ? "" : percent(probabilities[number])
    rows[index].className = number === best ? "best" : ""
  })
}

// The drawing

function paint() {
  const style = getComputedStyle(pad), isColoured = model.image_shape[0] === 3
  context.fillStyle = isColoured ? $("ground").value : style.getPropertyValue("--paper")
  context.fillRect(0, 0, pad.width, pad.height)
  context.lineCap = context.lineJoin = "round"
  for (const { points, width, colour } of strokes) {
    context.strokeStyle = context.fillStyle = isColoured ? colour : style.getPropertyValue("--ink")
    context.lineWidth = width
    context.beginPath()
    context.arc(...points[0], width / 2, 0, 2 * Math.PI) // a path of a single point would not be drawn
    context.fill()
    context.beginPath()
    context.moveTo(...points[0])
    for (let i = 1; i < points.length - 1; i++) {
      const [[x, y], [nextX, nextY]] = points.slice(i, i + 2)
      context.quadraticCurveTo(x, y, (x + nextX) / 2, (y + nextY) / 2)
    }
    context.lineTo(...points.at(-1))
    context.stroke()
  }
  $("undo").disabled = $("clear").disabled = strokes.length === 0
  $("invitation").hidden = strokes.length > 0 || keyboard.isShown
}

let isAsking = false, askAgain = false, timer

async function ask() { // one request at a time; afterwards, one more if the drawing has changed
  askAgain = isAsking
  if (isAsking) return
  isAsking = true
  do {
    askAgain = false
    let found
    if (strokes.length) {
      try {
        [found] = await predict(await new Promise(resolve => pad.toBlob(resolve, "image/png")))
      } catch (error) {
        found = { error: sentence(error) }
      }
    }
    if (shown === "drawing") show(strokes.length ? found : undefined)
  } while (askAgain)
  isAsking = false
}

function changed(isComplete = true) {
  paint()
  select("drawing")
  clearTimeout(isComplete ? timer : undefined)
  if (isComplete) ask()
  timer = isComplete ? undefined : timer ?? setTimeout(() => { timer = undefined; ask() }, LIVE_MS)
}

function begin(point) {
  strokes.push({ points: [point], width: $("width").value / 100 * SIDE, colour: $("ink").value })
}

function undo() {
  strokes.pop()
  changed()
}

function clear() {
  strokes.length = 0
  changed()
}

const pointer = {
  id: undefined,
  point: event => {
    const { left, top, width, height } = pad.getBoundingClientRect()
    return [(event.clientX - left) / width * pad.width, (event.clientY - top) / height * pad.height]
  },
  down: event => {
    if (pointer.id !== undefined || event.button) return
    pointer.id = event.pointerId
    pad.setPointerCapture(event.pointerId)
    keyboard.hide()
    begin(pointer.point(event))
    changed(false)
  },
  move: event => {
    if (event.pointerId !== pointer.id) return
    strokes.at(-1).points.push(...(event.getCoalescedEvents?.() ?? [event]).map(pointer.point))
    changed(false)
  },
  up: event => {
    if (event.pointerId !== pointer.id) return
    pointer.id = undefined
    changed()
  },
}

const keyboard = {
  at: [0, 0], isDown: false, isShown: false,
  show: () => {
    keyboard.isShown = true
    keyboard.place()
    paint()
  },
  hide: () => {
    keyboard.lift()
    $("cursor").hidden = true
    keyboard.isShown = false
    paint()
  },
  place: () => {
    const [x, y] = keyboard.at
    $("cursor").hidden = false
    $("cursor").className = keyboard.isDown ? "down" : ""
    $("cursor").style.left = `${100 * x / pad.width}%`
    $("cursor").style.top = `${100 * y / pad.height}%`
  },
  lift: () => {
    if (keyboard.isDown) $("pen-state").textContent = "Pen up"
    keyboard.isDown = false
  },
  toggle: () => {
    if (keyboard.isDown) return keyboard.lift()
    keyboard.isDown = true
    $("pen-state").textContent = "Pen down"
    begin([...keyboard.at])
    changed()
  },
  move: (dx, dy, step) => {
    const [x, y] = keyboard.at
    keyboard.at = [Math.min(Math.max(x + dx * step, 0), pad.width), Math.min(Math.max(y + dy * step, 0), pad.height)]
    if (keyboard.isDown) strokes.at(-1).points.push([...keyboard.at])
    if (keyboard.isDown) changed()
  },
  press: event => {
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key]
    const isUndo = event.key === "z" && (event.ctrlKey || event.metaKey)
    if (arrow) keyboard.move(...arrow, SIDE / (event.shiftKey ? 7 : 28))
    else if (event.key === " ") keyboard.toggle()
    else if (event.key === "Escape") keyboard.lift()
    else if (event.key === "Delete" || event.key === "Backspace" || isUndo) {
      keyboard.lift()
      isUndo ? undo() : clear()
    } else return
    event.preventDefault()
    keyboard.show()
  },
}

// Pictures

function select(one) {
  if (shown !== one) {
    shown = one
    pictures.forEach(({ button }) => button.setAttribute("aria-pressed", button === one?.button))
    show(one?.found)
  }
}

function addPicture(file) {
  const li = document.createElement("li"), button = document.createElement("button")
  const picture = { file, li, button, original: URL.createObjectURL(file), found: undefined }
  button.type = "button"
  button.setAttribute("aria-pressed", false)
  button.addEventListener("click", () => {
    select(picture)
    $("sight").scrollIntoView({ block: "nearest" })
  })
  li.append(button)
  $("gallery").append(li)
  pictures.push(picture)
  $("forget").hidden = false
  render(picture)
  return picture
}

function render({ button, file, original, found }) {
  const [first, second] = [original, found?.seen].map((src, index) =>
    src && Object.assign(document.createElement("img"), {
      src, alt: "", className: ["", "seen"][index], onerror: event => { event.target.hidden = true }, // of a TIFF, say
    }))
  const name = Object.assign(document.createElement("small"), { textContent: file.name, title: file.name })
  const best = document.createElement("strong")
  if (found?.probabilities) {
    const certainty = Object.assign(document.createElement("span"), { textContent: percent(found.probabilities[found.class]) })
    best.append(found.name, " ", certainty)
  } else {
    best.textContent = found ? "Unreadable" : "…"
  }
  const why = found?.error && Object.assign(document.createElement("small"), { textContent: found.error, className: "failed" })
  button.replaceChildren(...[first, second, best, name, why].filter(Boolean))
}

function* together(some) { // in batches within the limits of a request
  let list = [], bytes = 0
  for (const picture of some) {
    const size = picture.file.size + 1000 // overhead of the form
    if (list.length && (bytes + size > model.limits.bytes || list.length === PER_REQUEST)) {
      yield list
      list = [], bytes = 0
    }
    list.push(picture)
    bytes += size
  }
  if (list.length) yield list
}

async function predictPictures(some) {
  for (const list of together(some)) {
    const form = new FormData()
    list.forEach(({ file }) => form.append("picture", file, file.name))
    let found
    try {
      found = await predict(form)
    } catch (error) {
      found = list.map(() => ({ error: sentence(error) }))
    }
    list.forEach((picture, index) => {
      picture.found = found[index]
      render(picture)
      if (picture === shown) show(picture.found)
    })
  }
}

function take(files) {
  const added = [...files].map(addPicture)
  if (!added.length) return
  select(added[0])
  predictPictures(added)
}

function forget() {
  pictures.forEach(({ original }) => URL.revokeObjectURL(original))
  pictures.length = 0
  $("gallery").replaceChildren()
  $("forget").hidden = true
  select("drawing")
  ask()
}

// The start

function describe() {
  const [channels, height, width] = model.image_shape
  const kind = channels === 3 ? "in colour" : model.light_ground ? "dark on light" : "light on dark"
  const views = Math.max(...model.views)
  const facts = [model.checkpoints.join(", "), `images of ${width} × ${height} pixels, ${kind}`,
    `${model.class_names.length} classes`, ...(views > 1 ? [`test-time augmentation with ${views} views`] : [])]
  $("name").textContent = model.name
  document.title = `${model.name} – dist_mnist`
  $("facts").textContent = facts.join(" · ")
  $("fit").value = model.fit
  $("fit").closest("label").hidden = channels === 3 // colour pictures are always used whole
  $("example").textContent = `curl -F picture=@seven.png ${location.origin}/predict`
  $("seen").alt = `The network's image: ${width} × ${height} pixels`
  $("sight").style.setProperty("--aspect", `${width} / ${height}`)
  document.querySelectorAll(".coloured").forEach(label => { label.hidden = channels !== 3 })
  const scale = SIDE / Math.max(width, height)
  pad.width = Math.round(width * scale)
  pad.height = Math.round(height * scale)
  keyboard.at = [pad.width / 2, pad.height / 2]
}

function listen() {
  pad.addEventListener("pointerdown", pointer.down)
  pad.addEventListener("pointermove", pointer.move)
  for (const name of ["pointerup", "pointercancel"]) pad.addEventListener(name, pointer.up)
  pad.addEventListener("keydown", keyboard.press)
  pad.addEventListener("focus", () => { if (pad.matches(":focus-visible")) keyboard.show() })
  pad.addEventListener("blur", keyboard.hide)
  $("undo").addEventListener("click", undo)
  $("clear").addEventListener("click", clear)
  $("forget").addEventListener("click", forget)
  $("ground").addEventListener("input", () => changed())
  $("fit").addEventListener("change", () => { ask(); predictPictures(pictures) })
  $("files").addEventListener("change", event => { take(event.target.files); event.target.value = "" })
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint)
  const drop = isOver => event => {
    event.preventDefault()
    document.body.classList.toggle("dropping", isOver)
    if (event.type === "drop") take(event.dataTransfer.files)
  }
  for (const [name, isOver] of [["dragover", true], ["dragleave", false], ["drop", false]]) addEventListener(name, drop(isOver))
  addEventListener("paste", event => take(event.clipboardData.files))
}

try {
  model = await (await fetch("/model")).json()
  describe()
  listen()
  select("drawing")
  paint()
} catch (error) {
  $("facts").textContent = sentence(error)
}
