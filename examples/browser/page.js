/** The page: joins, lists the servers, measures round trips, and chats. */
import { Identity, short } from './identity.js'
import { pageAddress } from './records.js'
import { Swarm } from './swarm.js'

const PING_MS = 5000
const MAX_NEW_TOKENS = 256

const [own, state, servers, head, talk] = ['own', 'state', 'servers', 'head', 'talk'].map(id => document.getElementById(id))
const { join, chat } = document.forms
const roundTrips = new Map()
const measuring = new Set()
const messages = []
let swarm
let answering = false

const identity = await Identity.ofThisBrowser().catch(fail)
own.textContent = identity?.peer ?? ''
join.onsubmit = event => {
  event.preventDefault()
  enter().catch(fail)
}
chat.onsubmit = event => {
  event.preventDefault()
  if (!answering) say(chat.text.value.trim()).catch(fail)
}
setInterval(measure, PING_MS)
if (location.hash.startsWith('#webrtc:')) {
  // Whoever made the link chose the swarm: to enter it is for the one who reads this to decide.
  join.address.value = decodeURIComponent(location.hash.slice(1))
  show('This link leads to a swarm. Press Join to enter it: its members will see your network address.')
}

async function enter () {
  swarm?.close()
  show('joining …')
  const entered = swarm = new Swarm(identity, iceServers(join.ice.value))
  entered.addEventListener('changed', () => entered === swarm && draw())
  entered.addEventListener('state', event => entered === swarm && show(event.detail))
  await entered.join(join.address.value)
  show('joined')
  measure()
}

/** `stun:host:port`, or `turn:user:password@host:port`. */
function iceServers (text) {
  if (text.trim() === '') return []
  const [, scheme, user, password, place] = /^\s*(stun|turns?):(?:([^:@]+):([^@]*)@)?(\S+)\s*$/.exec(text) ?? []
  if (!scheme) throw new Error('a server for ICE is stun:host:port or turn:user:password@host:port')
  return [{ urls: `${scheme}:${place}`, ...(user && { username: user, credential: password }) }]
}

function measure () {
  for (const info of swarm?.servers ?? []) {
    if (!pageAddress(info) || measuring.has(info.peer)) continue
    measuring.add(info.peer)
    swarm.ping(info)
      .then(milliseconds => roundTrips.set(info.peer, `${milliseconds.toFixed(1)} ms`))
      .catch(error => roundTrips.set(info.peer, error.name))
      .finally(() => {
        measuring.delete(info.peer)
        draw()
      })
  }
}

async function say (text) {
  if (text === '') return
  answering = true
  chat.text.value = ''
  messages.push({ role: 'user', content: text })
  line('user', text)
  const answer = line('assistant', '')
  draw()
  try {
    for await (const piece of swarm.generate(messages, { max_new_tokens: MAX_NEW_TOKENS })) answer.textContent += piece
    messages.push({ role: 'assistant', content: answer.textContent })
  } catch (error) {
    messages.pop()
    answer.className = 'error'
    answer.textContent += ` (${error.message})`
  } finally {
    answering = false
    draw()
  }
}

// --- what is seen ------------------------------------------------------------------------------------------

function draw () {
  servers.replaceChildren(...swarm.servers.map(row))
  const heads = swarm.heads
  head.textContent = heads.length ? `with ${heads[0].heads[0].name}, by ${short(heads[0].peer)}` : 'no peer makes text yet'
  chat.querySelector('button').disabled = answering || heads.length === 0
}

function row (info) {
  const cells = [
    short(info.peer) + (info.public_name ? ` ${info.public_name}` : ''),
    info.state,
    blocks(info),
    info.model?.name ?? '',
    roundTrips.get(info.peer) ?? (pageAddress(info) ? '…' : 'no address for pages')
  ]
  const element = document.createElement('tr')
  element.dataset.peer = info.peer
  element.append(...cells.map(content => {
    const cell = document.createElement('td')
    cell.append(content)
    return cell
  }))
  return element
}

/** The span as a bar along all blocks of the model. */
function blocks ({ span, model }) {
  if (span == null || model == null) return 'none'
  const bar = document.createElement('span')
  bar.className = 'span'
  const part = document.createElement('i')
  part.style.left = `${100 * span.start / model.blocks}%`
  part.style.width = `${100 * (span.end - span.start) / model.blocks}%`
  bar.append(part)
  const cell = document.createDocumentFragment()
  cell.append(bar, `${span.start}:${span.end}`)
  return cell
}

function line (role, text) {
  const paragraph = document.createElement('p')
  paragraph.className = role
  paragraph.textContent = text
  talk.append(paragraph)
  return paragraph
}

function show (text) {
  state.className = ''
  state.textContent = text
}

function fail (error) {
  console.error(error)
  state.className = 'error'
  state.textContent = error.message
}
